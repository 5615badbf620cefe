"""Aya Vision: SigLIP tower, pixel shuffle and a gated projector, Cohere 2 decoder with GQA 4/2.

Special: three sliding layers before each full one, of which only the sliding ones rotate (full layers know no
positions), in an interleaved way. Attention and MLP of a layer run side by side on the same normed input. The window of
8 is shorter than one tile. An image is one tile of 9 tokens, or two and the whole picture, each behind a text token.
"""

import torch
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, SiglipVisionConfig

from tests.zoo._base import (
    DECODER,
    IMAGE,
    ROW_BREAK,
    VISION,
    VISION_END,
    VISION_START,
    ZooModel,
    build,
    image_tokens,
    stacked_inputs,
)

SIDE, PATCH, FACTOR = 24, 4, 2
TILE = [ROW_BREAK, *[IMAGE] * (SIDE // PATCH // FACTOR) ** 2]
KINDS = ("sliding", "sliding", "sliding", "full") * 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=Cohere2Config(**{**DECODER, "num_hidden_layers": len(KINDS)}, sliding_window=8),
        image_token_index=IMAGE,
        downsample_factor=FACTOR,
        tie_word_embeddings=False,
    )
    return build(AyaVisionForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="aya_vision",
    make=make,
    inputs=stacked_inputs(
        {"A": [VISION_START, *TILE, VISION_END], "B": [VISION_START, *TILE * 3, VISION_END]},
        SIDE,
        tiles={"A": 1, "B": 3},
    ),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
