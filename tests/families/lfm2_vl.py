"""LFM2-VL: SigLIP 2 tower on patches of any aspect, a decoder of short convolutions and a few attention layers.

Special: a convolution layer keeps its last three inputs instead of keys, and hides padding from them. Attention layers
norm q and k. Images differ in size (6 and 16 tokens), are padded to the largest number of patches, and are projected
one by one.
"""

import torch
from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

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

PATCH, MERGE = 4, 2
SIZES = {"A": (4, 6), "B": (8, 8)}  # patches: height, width
LARGEST = 8 * 8
KINDS = ("none", "full", "none", "full", "none", "full")
LAYERS = {"none": "conv", "full": "full_attention"}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(**VISION, num_patches=16, patch_size=PATCH, vision_use_head=False),
        text_config=Lfm2Config(
            **{**DECODER, "num_hidden_layers": len(KINDS)},
            layer_types=[LAYERS[kind] for kind in KINDS],
            block_auto_adjust_ff_dim=False,
        ),
        image_token_id=IMAGE,
        projector_hidden_size=48,
        downsample_factor=MERGE,
        tie_word_embeddings=False,
    )
    return build(Lfm2VlForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        height, width = SIZES[size]
        patches = torch.zeros(LARGEST, 3 * PATCH**2)
        patches[: height * width] = pixels(generator, height * width, 3 * PATCH**2)
        return [VISION_START, *[IMAGE] * (height * width // MERGE**2), VISION_END], (patches, SIZES[size])

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        patches, shapes = zip(*made.flat_images, strict=True)
        shapes = torch.tensor(shapes)
        out |= {
            "pixel_values": torch.stack(patches).to(dtype_of(model)),
            "spatial_shapes": shapes,
            "pixel_attention_mask": (torch.arange(LARGEST) < shapes.prod(-1, keepdim=True)).long(),
        }
    return out


MODEL = ZooModel(
    name="lfm2_vl",
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
