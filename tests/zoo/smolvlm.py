"""SmolVLM: SigLIP-like tower with a patch mask, pixel shuffle, Llama decoder with as many KV heads as heads (MHA 4/4).

Special: an image is one or three tiles of 4 tokens with a text token before each, so several visual spans per image.
`pixel_values` is [batch, tiles, ...], and rows with fewer tiles are padded with black ones, which the model throws out.
"""

import torch
from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

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

SIDE, PATCH = 16, 4
TILES = {"A": 1, "B": 3}
TOKENS = (SIDE // PATCH // 2) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = SmolVLMConfig(
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH},
        text_config=LlamaConfig(**{**DECODER, "num_key_value_heads": 4}),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=DECODER["pad_token_id"],
    )
    return build(SmolVLMForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        tiles = TILES[size]
        return [VISION_START, *[IMAGE] * TOKENS] * tiles + [VISION_END], pixels(generator, tiles, 3, SIDE, SIDE)

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        rows = [torch.cat([*row, torch.zeros(0, 3, SIDE, SIDE)]) for row in made.images]
        out["pixel_values"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(dtype_of(model))
    return out


MODEL = ZooModel(
    name="smolvlm",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.text_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
