"""GLM-4.5V: the tower of GLM-4.1V, a decoder whose layers behind the first have experts, two of four for each token.

Special: one layer in front is dense; behind it a sigmoid router with a correction of its own, and an expert that every
token shares. q, k and v have biases, half of each head is rotated. Layers have two norms, not four.
"""

import dataclasses

import torch
from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

from tests.families import glm4v
from tests.zoo._base import build

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Glm4vMoeConfig(text_config={**glm4v.TEXT, **EXPERTS}, vision_config=glm4v.TOWER, **glm4v.IDS)
    return build(Glm4vMoeForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(glm4v.MODEL, name="glm4v_moe", make=make)
