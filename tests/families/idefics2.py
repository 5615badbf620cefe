"""Idefics2: SigLIP-like tower with a patch mask, perceiver resampler, Mistral decoder with GQA 4/2.

Special: three layers of cross-attention between 16 latents and the patches of an image, so every image is 16 tokens,
whatever its size. Every decoder layer is sliding, as Mistral is unless told otherwise; the window of 24 (of 4,096) is
shorter than the prompt. `pixel_values` is [batch, images, ...] with a mask for each image; rows with fewer images are
padded with black ones, which the model throws out.
"""

import torch
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, MistralConfig

from tests.zoo._base import (
    DECODER,
    IMAGE,
    VISION,
    VISION_START,
    ZooModel,
    build,
    dtype_of,
    image_tokens,
    pixels,
    prompt,
)

SIDE, PATCH, LATENTS, DEPTH = 24, 6, 16, 3
SIZES = {"A": (12, 24), "B": (24, 24)}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Idefics2Config(
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH},
        perceiver_config={
            "hidden_size": DECODER["hidden_size"],
            "resampler_n_latents": LATENTS,
            "resampler_depth": DEPTH,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=MistralConfig(**DECODER, sliding_window=24),
        image_token_id=IMAGE,
    )
    return build(Idefics2ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        return [VISION_START, *[IMAGE] * LATENTS, VISION_START], pixels(generator, 3, *SIZES[size])

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        most = max(map(len, made.images))
        values = torch.zeros(batch, most, 3, SIDE, SIDE)
        mask = torch.zeros(batch, most, SIDE, SIDE, dtype=torch.long)
        for row, images in enumerate(made.images):
            for i, picture in enumerate(images):
                height, width = picture.shape[1:]
                values[row, i, :, :height, :width] = picture
                mask[row, i, :height, :width] = 1
        out |= {"pixel_values": values.to(dtype_of(model)), "pixel_attention_mask": mask}
    return out


MODEL = ZooModel(
    name="idefics2",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.text_model.layers",
    attention_kinds=("sliding",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2 + DEPTH,
)
