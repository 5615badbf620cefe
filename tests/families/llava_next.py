"""LLaVA-NeXT (1.6): CLIP tower without its CLS token, Llama decoder with GQA 4/2, any-resolution tiles.

Special: an image is a base tile (4 tokens) plus a grid of tiles, whose rows of patches each end in a learned newline,
without the rows or columns that only padded the image: 4 + 2 x (4+1) = 14 tokens for a wide image on two tiles,
4 + 4 x (2+1) = 16 for a narrow one in the middle of four. `pixel_values` is 5-D, padded to the largest number of tiles.
Features are those of the last layer but one.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from tests.zoo import _tiles
from tests.zoo._base import DECODER, IMAGE, VISION, ZooModel, build, image_tokens
from tests.zoo._tiles import PATCH, SIDE

PINPOINTS = [[12, 24], [24, 24]]
IMAGES = {"A": ((12, 24), 3, 4 + 2 * (4 + 1)), "B": ((24, 16), 5, 4 + 4 * (2 + 1))}  # "B": the middle of four tiles


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(**DECODER),
        image_token_index=IMAGE,
        image_seq_length=(SIDE // PATCH) ** 2,
        image_grid_pinpoints=PINPOINTS,
    )
    return build(LlavaNextForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    return _tiles.inputs(model, IMAGES, batch, seed, first)


MODEL = ZooModel(
    name="llava_next",
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
