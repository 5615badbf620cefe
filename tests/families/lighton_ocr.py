"""LightOnOCR: Pixtral tower, Qwen3 decoder, which norms q and k head by head (GQA 4/2).

Special: images as in `mistral3`: of any size, several visual spans each.
"""

import dataclasses

import torch
from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration, PixtralVisionConfig, Qwen3Config

from tests.zoo import mistral3
from tests.zoo._base import DECODER, IMAGE, VISION, build


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = LightOnOcrConfig(
        vision_config=PixtralVisionConfig(**VISION, image_size=max(mistral3.LARGEST), patch_size=mistral3.PATCH),
        text_config=Qwen3Config(**DECODER, head_dim=24),
        image_token_id=IMAGE,
        spatial_merge_size=mistral3.MERGE,
        tie_word_embeddings=False,
    )
    return build(LightOnOcrForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(mistral3.MODEL, name="lighton_ocr", make=make)
