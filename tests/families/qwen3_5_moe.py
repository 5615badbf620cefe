"""Qwen3.5-MoE: Qwen3.5 with experts, two of four for each token, and one that every token shares, behind a gate.

Special: as `qwen3_5`.
"""

import dataclasses

import torch
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from tests.families import qwen3_5
from tests.zoo import _qwen
from tests.zoo._base import build

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Qwen3_5MoeConfig(text_config={**qwen3_5.TEXT, **EXPERTS}, vision_config=qwen3_5.TOWER, **_qwen.IDS)
    return build(Qwen3_5MoeForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(qwen3_5.MODEL, name="qwen3_5_moe", make=make)
