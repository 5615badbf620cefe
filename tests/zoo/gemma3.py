"""Gemma 3: SigLIP tower pooled to 9 tokens an image, sliding and full decoder layers, normed q and k, GQA 4/2.

Special: layers are sliding, sliding, full, full, so that neighbours share a kind; the window of 8 is shorter than one
image. Image tokens attend to their own image in both directions, which needs `token_type_ids`. The two kinds of layer
rotate with different bases. The scale is not head_dim ** -0.5. Embeddings are scaled by sqrt(hidden size).
"""

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from tests.zoo._base import (
    DECODER,
    IMAGE,
    VISION,
    VISION_END,
    VISION_START,
    ZooModel,
    build,
    image_tokens,
    stacked_inputs,
)

SIDE, PATCH, TOKENS = 24, 4, 9
KINDS = ("sliding", "sliding", "full", "full")


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = Gemma3TextConfig(
        **DECODER,
        head_dim=16,
        query_pre_attn_scalar=10,
        sliding_window=8,
        layer_types=[f"{kind}_attention" for kind in KINDS],
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )
    return build(Gemma3ForConditionalGeneration, config, attn_implementation, dtype, seed, embed_std=1 / 8)


MODEL = ZooModel(
    name="gemma3",
    make=make,
    inputs=stacked_inputs(
        [VISION_START, *[IMAGE] * TOKENS, VISION_END],
        SIDE,
        extra=lambda made: {"token_type_ids": (made.input_ids == IMAGE).long()},
    ),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
)
