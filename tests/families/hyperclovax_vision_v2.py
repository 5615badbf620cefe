"""HyperCLOVA X SEED Think: Qwen2.5-VL's tower and one matrix behind it, HyperCLOVA X decoder with GQA 4/2.

Special: a norm behind attention and MLP as well as before. Plain RoPE: images count as so many tokens. Scales of
attention, embeddings, residuals and logits are the configuration's.
"""

import dataclasses

import torch
from transformers import HyperCLOVAXConfig, HyperCLOVAXVisionV2Config, HyperCLOVAXVisionV2ForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from tests.families import exaone4_5
from tests.zoo import _qwen
from tests.zoo._base import DECODER, IMAGE, VIDEO, build

SCALES = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.5,
    "logits_scaling": 0.75,
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    tower = {
        **_qwen.TOWER,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 48,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = HyperCLOVAXVisionV2Config(
        text_config=HyperCLOVAXConfig(**DECODER, **SCALES),
        vision_config=Qwen2_5_VLVisionConfig(**tower),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    return build(HyperCLOVAXVisionV2ForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(exaone4_5.MODEL, name="hyperclovax_vision_v2", make=make, attention_kinds=("full",) * 4)
