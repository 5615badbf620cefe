"""Idefics3: SigLIP-like tower with a patch mask, pixel shuffle, Llama decoder with GQA 4/2.

Special: an image is one tile of 9 tokens, or two and the whole picture, with text tokens before each, so several visual
spans per image. `pixel_values` is [batch, tiles, ...] with a mask for each tile; rows with fewer tiles are padded with
black ones, which the model throws out.
"""

import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

from tests.zoo._base import (
    DECODER,
    IMAGE,
    PAD,
    ROW_BREAK,
    VISION,
    VISION_START,
    ZooModel,
    build,
    dtype_of,
    image_tokens,
    pixels,
    prompt,
)

SIDE, PATCH, SCALE = 24, 4, 2
TILES = {"A": 1, "B": 3}
TOKENS = (SIDE // PATCH // SCALE) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Idefics3Config(
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH},
        text_config=LlamaConfig(**DECODER),
        image_token_id=IMAGE,
        scale_factor=SCALE,
        pad_token_id=PAD,
    )
    return build(Idefics3ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        tile = [VISION_START, ROW_BREAK, *[IMAGE] * TOKENS]  # the second names the tile
        return tile * TILES[size] + [VISION_START], pixels(generator, TILES[size], 3, SIDE, SIDE)

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        rows = [torch.cat([*row, torch.zeros(0, 3, SIDE, SIDE)]) for row in made.images]
        values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = values.ne(0).any(2).long()
        out |= {"pixel_values": values.to(dtype_of(model)), "pixel_attention_mask": mask}
    return out


MODEL = ZooModel(
    name="idefics3",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.text_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
