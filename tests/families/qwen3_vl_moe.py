"""Qwen3-VL-MoE: Qwen3-VL with experts, two of four for each token.

Special: deepstack as in `qwen3_vl`, whose boolean indexing breaks Dynamo's graph behind the first layers. Which expert
a token goes to depends on its hidden state.
"""

import dataclasses

import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from tests.zoo import _qwen, qwen3_vl
from tests.zoo._base import build

LAYERS = 4
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = {**_qwen.TEXT, "num_hidden_layers": LAYERS, "head_dim": 16, **EXPERTS}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=qwen3_vl.TOWER, **_qwen.IDS)
    return build(Qwen3VLMoeForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(qwen3_vl.MODEL, name="qwen3_vl_moe", make=make, attention_kinds=("full",) * LAYERS)
