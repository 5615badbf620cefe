"""GLM-OCR: a tower that norms queries and keys, and the decoder of GLM-4.1V with whole heads rotated.

Special: positions of the tower are rotations alone. q, k and v of the decoder have no biases; layers have four norms.
"""

import dataclasses

import torch
from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

from tests.families import glm4v
from tests.zoo import _qwen
from tests.zoo._base import build

TEXT = {**_qwen.TEXT, "head_dim": 16}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = GlmOcrConfig(text_config=TEXT, vision_config=glm4v.TOWER, **glm4v.IDS)
    return build(GlmOcrForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(glm4v.MODEL, name="glm_ocr", make=make)
