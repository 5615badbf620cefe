"""LLaVA-OneVision: SigLIP tower, Qwen2 decoder (biased q/k/v), any-resolution tiles.

Special: an image is a base tile (4 tokens) plus a grid of tiles with a learned newline after every row of patches, so
sizes differ: 4 + 2 x (4+1) = 14 tokens for two tiles, 4 + 4 x (4+1) = 24 for four. `pixel_values` is 5-D, padded to the
largest number of tiles.
"""

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from tests.zoo import _tiles
from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION, ZooModel, build, image_tokens
from tests.zoo._tiles import PATCH, SIDE

IMAGES = {"A": ((12, 24), 3, 4 + 2 * (4 + 1)), "B": ((24, 24), 5, 4 + 4 * (4 + 1))}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=Qwen2Config(**DECODER),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[list(size) for size, _, _ in IMAGES.values()],
    )
    return build(LlavaOnevisionForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    return _tiles.inputs(model, IMAGES, batch, seed, first)


MODEL = ZooModel(
    name="llava_onevision",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
