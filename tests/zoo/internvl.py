"""InternVL 3: tower with layer scale and a CLS token that is dropped, pixel shuffle, Qwen2 decoder with GQA 4/2.

Special: an image is one or two square tiles of 9 tokens each, one contiguous span of 9 or 18.
"""

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

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

SIDE, PATCH = 24, 4
TILES = {"A": 1, "B": 2}
TOKENS = (SIDE // PATCH // 2) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH),
        text_config=Qwen2Config(**DECODER),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    return build(InternVLForConditionalGeneration, config, attn_implementation, dtype, seed)


PLACEHOLDER = {size: [VISION_START, *[IMAGE] * (TOKENS * tiles), VISION_END] for size, tiles in TILES.items()}

MODEL = ZooModel(
    name="internvl",
    make=make,
    inputs=stacked_inputs(PLACEHOLDER, SIDE, TILES),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
