"""Step-3.7: tower with 2-D RoPE and two strided convolutions, gated decoder of a full and three sliding layers.

Special: sliding layers have more query heads than full ones (GQA 8/2 and 4/2), and one gate for each head's output.
Queries and keys are normed; kinds rotate by different bases, full layers half of each head. Layers behind the first
route each token to 2 of 4 experts beside a shared one, some of them clamped. An image is its whole (9 tokens) behind
crops of a smaller side (4 tokens each, position embeddings interpolated), if it is large enough to have any.
"""

import torch
from transformers import Step3p7Config, Step3p7ForConditionalGeneration

from tests.zoo._base import (
    DECODER,
    IMAGE,
    ROW_BREAK,
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

PATCH, STRIDE = 4, 4
SIDE, CROP = 48, 32
CROPS = {"A": 0, "B": 2}
KINDS = ("full", "sliding", "sliding", "sliding", "full")


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    layers = len(KINDS)
    text = {
        **{**DECODER, "num_hidden_layers": layers},
        "head_dim": 16,
        "layer_types": [f"{kind}_attention" for kind in KINDS],
        "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)],
        "sliding_window": 8,
        "num_sliding_attention_heads": 8,
        "rope_theta": [50000.0 if kind == "full" else 10000.0 for kind in KINDS],
        "partial_rotary_factors": [0.5 if kind == "full" else 1.0 for kind in KINDS],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
        "swiglu_limits": [0.0, 0.0, 1.0, 0.0, 1.0],
        "swiglu_limits_shared": [0.0, 0.0, 0.0, 2.0, 2.0],
    }
    vision = {**VISION, "mlp_ratio": 1.5, "image_size": SIDE, "patch_size": PATCH}
    config = Step3p7Config(text_config=text, vision_config=vision, image_token_id=IMAGE, tie_word_embeddings=False)
    return build(Step3p7ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def view(side):
        return [VISION_START, *[IMAGE] * (side // PATCH // STRIDE) ** 2, VISION_END]

    def image(size, generator):
        crops = CROPS[size]
        tokens = [token for _ in range(crops) for token in (*view(CROP), ROW_BREAK)]
        return [*tokens, *view(SIDE)], (pixels(generator, 3, SIDE, SIDE), pixels(generator, crops, 3, CROP, CROP))

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        wholes, crops = zip(*made.flat_images, strict=True)
        out |= {
            "pixel_values": torch.stack(wholes).to(dtype_of(model)),
            "num_local_patches": torch.tensor([len(crop) for crop in crops]),
        }
        if any(map(len, crops)):
            out["pixel_values_local"] = torch.cat(crops).to(dtype_of(model))
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
