"""Phi-4-multimodal: SigLIP tower read one layer before its end, crops pooled two by two, Phi decoder (GQA 4/2).

Special: queries, keys and values come from one projection, three quarters of each head are rotated, by LongRoPE, whose
factors depend on the longest position. Tower, projector and decoder layers are one module's: there is no language model
apart. An image is its crops, a row of features at a time and each row ended by a learned one, less the padding that its
mask tells, then a separator and a small whole image: 11 and 15 tokens. Features are written by `index_put` at indices
that `nonzero` finds, if any token is an image's: a branch on data in every step. The audio tower exists and is not run.
Where no image of a batch has padding, SDPA takes the tower for causal and eager attention does not: all here have some.
"""

import torch
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

from tests.zoo._base import (
    DECODER,
    IMAGE,
    VISION,
    VOCAB,
    ZooModel,
    build,
    dtype_of,
    image_tokens,
    pixels,
    prompt,
)

SIDE, PATCH, POOL = 16, 4, 2
GRID = SIDE // PATCH
SIZES = {"A": (1, 1, 2), "B": (1, 2, 2)}  # crops: down, across; columns of patches that are padding
CROPS = 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.1 * i for i in range(6)],
        "long_factor": [2.0 + 0.5 * i for i in range(6)],
    }
    vision = {**VISION, "image_size": SIDE, "crop_size": SIDE, "patch_size": PATCH, "image_token_id": IMAGE}
    audio = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 2,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 16,
        "audio_token_id": VOCAB - 1,
    }
    config = Phi4MultimodalConfig(
        **DECODER,
        original_max_position_embeddings=512,
        rope_parameters=rope,
        vision_config=vision,
        audio_config=audio,
    )
    return build(Phi4MultimodalForCausalLM, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        down, across, padding = SIZES[size]
        mask = torch.ones(down * GRID, across * GRID)
        mask[:, across * GRID - padding :] = 0
        crops = mask.unflatten(0, (down, GRID)).unflatten(2, (across, GRID)).transpose(1, 2).flatten(0, 1)
        masks = torch.ones(1 + CROPS, GRID, GRID)
        masks[1 : 1 + down * across] = crops
        base = GRID // POOL
        tokens = down * base * ((across * GRID - padding) // POOL + 1) + 1 + base * (base + 1)
        return [IMAGE] * tokens, (pixels(generator, 1 + CROPS, 3, SIDE, SIDE), masks, (down * SIDE, across * SIDE))

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        crops, masks, sizes = zip(*made.flat_images, strict=True)
        out |= {
            "image_pixel_values": torch.stack(crops).to(dtype_of(model)),
            "image_attention_mask": torch.stack(masks),
            "image_sizes": torch.tensor(sizes),
        }
    return out


MODEL = ZooModel(
    name="phi4_multimodal",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=3,
    mixed_sizes=True,
)
