"""Unlimited-OCR: SAM tower, CLIP encoder on its feature map, both side by side an image's tokens, experts.

Special: every decoder layer sees the whole prompt and a window of 4 (of 128) over what was generated: its cache keeps
the prompt apart from the window and joins both on every step. An image is 4 rows of 4 tokens with a learned newline
each and a separator (21 tokens). Decoder as in `deepseek_ocr2`.
"""

import dataclasses

import torch
from transformers import UnlimitedOcrConfig, UnlimitedOcrForConditionalGeneration

from tests.families import deepseek_ocr2
from tests.zoo._base import IMAGE, VISION, build, stacked_inputs

SIDE = deepseek_ocr2.SIDE
GRID = SIDE // deepseek_ocr2.PATCH // 4
TOKENS = GRID * (GRID + 1) + 1


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = UnlimitedOcrConfig(
        vision_config={"sam_config": deepseek_ocr2.SAM, "encoder_config": {**VISION, "image_size": 8, "patch_size": 2}},
        text_config={**deepseek_ocr2.TEXT, "sliding_window": 4},
        image_token_id=IMAGE,
    )
    return build(UnlimitedOcrForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(
    deepseek_ocr2.MODEL,
    name="unlimited_ocr",
    make=make,
    inputs=stacked_inputs([IMAGE] * TOKENS, SIDE),
    attention_kinds=("sliding",) * 4,
    mixed_sizes=False,
    no_cache=False,
    padding_exact=False,
    notes="Without a cache all tokens count as prompt. Once the window moves, padding is looked up at the wrong keys.",
)
