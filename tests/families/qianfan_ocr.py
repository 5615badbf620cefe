"""Qianfan-OCR: InternVL's tower and projector, Qwen3 decoder, which norms q and k head by head (GQA 4/2).

Special: tiles as in `internvl`. The tower's stochastic depth is there and does nothing outside training.
"""

import dataclasses

import torch
from transformers import QianfanOCRConfig, QianfanOCRForConditionalGeneration, QianfanOCRVisionConfig, Qwen3Config

from tests.zoo import internvl
from tests.zoo._base import DECODER, IMAGE, VISION, build


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = QianfanOCRConfig(
        vision_config=QianfanOCRVisionConfig(**VISION, image_size=internvl.SIDE, patch_size=internvl.PATCH),
        text_config=Qwen3Config(**DECODER, head_dim=24),
        image_token_id=IMAGE,
        image_seq_length=internvl.TOKENS,
        tie_word_embeddings=False,
    )
    return build(QianfanOCRForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(internvl.MODEL, name="qianfan_ocr", make=make, head_dim=24)
