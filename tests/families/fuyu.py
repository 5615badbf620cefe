"""Fuyu: no tower at all, patches are projected by one linear layer, Persimmon decoder (MHA 4/4).

Special: queries, keys and values come from one projection, q and k have layer norms with biases, half of each head is
rotated, the activation is a squared ReLU. Each row of patches ends in a newline token, so an image of several rows is
several visual spans: 6 and 16 patches.
"""

import torch
from transformers import FuyuConfig, FuyuForCausalLM, PersimmonConfig

from tests.zoo._base import DECODER, IMAGE, ROW_BREAK, ZooModel, build, dtype_of, image_tokens, pixels, prompt

PATCH = 4
SIZES = {"A": (2, 3), "B": (4, 4)}  # patches: height, width


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
    rope = {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5}
    config = FuyuConfig(
        text_config=PersimmonConfig(**text, rope_parameters=rope),
        patch_size=PATCH,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return build(FuyuForCausalLM, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        height, width = SIZES[size]
        return [*[IMAGE] * width, ROW_BREAK] * height, pixels(generator, height * width, 3 * PATCH**2)

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        out["pixel_values"] = torch.cat(made.flat_images)[None].to(dtype_of(model))
    return out


MODEL = ZooModel(
    name="fuyu",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=0,
    mixed_sizes=True,
)
