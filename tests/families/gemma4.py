"""Gemma 4 (as E2B): packed patches of any aspect, sliding and full decoder layers, the last keep no keys of their own.

Special: full layers have heads twice as wide as sliding ones and rotate a quarter of each. The last two layers (one of
each kind) attend to the keys and values of the last layer of their kind before them. Where only the last logits are
asked for, as in `generate`, these two layers run on the prompt's last row alone. Every layer adds an embedding of its
own of the token. The scale is 1, as q, k and v are normed. The tower pools 3 x 3 patches; images differ in size.
The audio tower exists and is not run.
"""

import torch
from transformers import (
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
)

from tests.zoo._base import (
    DECODER,
    IMAGE,
    VIDEO,
    VISION,
    VISION_END,
    VISION_START,
    VOCAB,
    ZooModel,
    build,
    dtype_of,
    image_tokens,
    pixels,
    prompt,
)

PATCH, POOL = 4, 3
SIZES = {"A": (9, 12), "B": (12, 15)}  # patches: height, width; 12 and 20 tokens
LARGEST = 12 * 15
KINDS = ("sliding", "full", "sliding", "full", "sliding", "full")
SHARED = 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = Gemma4TextConfig(
        **{**DECODER, "num_hidden_layers": len(KINDS)},
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        layer_types=[f"{kind}_attention" for kind in KINDS],
        num_kv_shared_layers=SHARED,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        final_logit_softcapping=30.0,
    )
    vision = Gemma4VisionConfig(
        **VISION,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=PATCH,
        pooling_kernel_size=POOL,
        position_embedding_size=32,
    )
    audio = Gemma4AudioConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        subsampling_conv_channels=[4, 4],
        output_proj_dims=16,
    )
    config = Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=VOCAB - 1,
        tie_word_embeddings=False,
    )
    parts = {"text_config": attn_implementation, "vision_config": attn_implementation, "audio_config": "eager"}
    model = build(Gemma4ForConditionalGeneration, config, parts, dtype, seed, embed_std=1 / 8)
    for layer in model.model.language_model.layers:  # trained ones make up for the missing scale
        layer.self_attn.q_norm.weight.mul_(layer.self_attn.head_dim**-0.5)
    return model


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        height, width = SIZES[size]
        patches = torch.zeros(LARGEST, 3 * PATCH**2)
        patches[: height * width] = pixels(generator, height * width, 3 * PATCH**2)
        places = torch.full((LARGEST, 2), -1)
        places[: height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
        return [VISION_START, *[IMAGE] * (height * width // POOL**2), VISION_END], (patches, places)

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


MODEL = ZooModel(
    name="gemma4",
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
    shares={4: 2, 5: 3},
)
