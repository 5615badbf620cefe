"""Step 3.7: a tower that sees the image whole and in crops, a decoder of sliding layers and full ones, and experts.

Special: sliding layers have six heads (GQA 6/2) where full ones have four; half of a full layer's head is rotated,
all of a sliding one's. Each head's output is multiplied by a gate of its own. Queries and keys are normed. The tower
rotates its patches by row and column, and two convolutions make one token of 4 x 4. An image is 16 tokens, or 24 with
two crops in front, whose pixels are an input of their own.
"""

import torch
from transformers import Step3p7Config, Step3p7ForConditionalGeneration

from tests.zoo._base import (
    DECODER,
    IMAGE,
    VISION,
    VISION_END,
    VISION_START,
    ZooModel,
    build,
    dtype_of,
    image_tokens,
    pixels,
    prompt,
)

CROPS = {"A": 0, "B": 2}
SIDE, CROP_SIDE, PATCH, MERGE = 32, 16, 2, 4
KINDS = ("sliding", "full", "sliding", "full")


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    layers = len(KINDS)
    config = Step3p7Config(
        text_config={
            **DECODER,
            "num_hidden_layers": layers,
            "layer_types": [f"{kind}_attention" for kind in KINDS],
            "head_dim": 16,
            "sliding_window": 8,
            "num_sliding_attention_heads": 6,
            "partial_rotary_factors": [0.5 if kind == "full" else 1.0 for kind in KINDS],
            "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
            "swiglu_limits": [None, None, None, 1.0],
        },
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH, "mlp_ratio": 1.5},
        image_token_id=IMAGE,
    )
    return build(Step3p7ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def tokens(side):
        return (side // PATCH // MERGE) ** 2

    def image(size, generator):
        crops = CROPS[size]
        length = crops * tokens(CROP_SIDE) + tokens(SIDE)
        views = pixels(generator, 1, 3, SIDE, SIDE), pixels(generator, crops, 3, CROP_SIDE, CROP_SIDE)
        return [VISION_START, *[IMAGE] * length, VISION_END], (*views, crops)

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        whole, crops, counts = zip(*made.flat_images, strict=True)
        out |= {
            "pixel_values": torch.cat(whole).to(dtype_of(model)),
            "pixel_values_local": torch.cat(crops).to(dtype_of(model)),
            "num_local_patches": torch.tensor(counts),
        }
    return out


MODEL = ZooModel(
    name="step3p7",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
