"""Gemma 4 12B: no tower at all, one matrix and learned places for each patch; the decoder of Gemma 4 (GQA 4/2, 4/1).

Special: images see themselves in both directions, in sliding layers within the window. Full layers have heads twice as
wide, half as many of keys, and no `v_proj`: values are what `k_proj` makes, normed without weights and not rotated. The
scale is 1, as q, k and v are normed. Images differ in size (12 and 20 patches); audio frames would be projected alike.
For a static cache `generate` makes the masks ahead, and there images are causal in full layers: other logits.
"""

import dataclasses

import torch
from transformers import (
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
)

from tests.families import gemma4
from tests.zoo._base import (
    DECODER,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    build,
    dtype_of,
    pixels,
    prompt,
)

PATCH, POOL = 2, 3
SIDE = PATCH * POOL
SIZES = {"A": (3, 4), "B": (4, 5)}  # patches, each of which is a token: height, width
LARGEST = 4 * 5
KINDS = ("sliding", "full", "sliding", "full")


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = Gemma4UnifiedTextConfig(
        **DECODER,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=8,
        layer_types=[f"{kind}_attention" for kind in KINDS],
        final_logit_softcapping=30.0,
    )
    config = Gemma4UnifiedConfig(
        text_config=text,
        vision_config=Gemma4UnifiedVisionConfig(
            patch_size=PATCH, pooling_kernel_size=POOL, mm_embed_dim=48, output_proj_dims=48, mm_posemb_size=8
        ),
        audio_config=Gemma4UnifiedAudioConfig(audio_embed_dim=16),
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=VOCAB - 1,
        tie_word_embeddings=False,
    )
    model = build(Gemma4UnifiedForConditionalGeneration, config, attn_implementation, dtype, seed, embed_std=1 / 8)
    for layer in model.model.language_model.layers:  # trained ones make up for the missing scale
        layer.self_attn.q_norm.weight.mul_(layer.self_attn.head_dim**-0.5)
    return model


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        height, width = SIZES[size]
        patches = torch.zeros(LARGEST, 3 * SIDE**2)
        patches[: height * width] = pixels(generator, height * width, 3 * SIDE**2)
        places = torch.full((LARGEST, 2), -1)
        places[: height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
        return [VISION_START, *[IMAGE] * (height * width), VISION_END], (patches, places)

    made = prompt(image, batch, seed, first)
    out = {
        "input_ids": made.input_ids,
        "attention_mask": made.attention_mask,
        "mm_token_type_ids": (made.input_ids == IMAGE).long(),
    }
    if made.flat_images:
        patches, places = zip(*made.flat_images, strict=True)
        out |= {"pixel_values": torch.stack(patches).to(dtype_of(model)), "image_position_ids": torch.stack(places)}
    return out


MODEL = dataclasses.replace(
    gemma4.MODEL,
    name="gemma4_unified",
    make=make,
    inputs=inputs,
    attention_kinds=KINDS,
    vision_sites=0,
    static_cache=False,
    shares={},
)
