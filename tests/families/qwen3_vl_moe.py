"""Qwen3-VL-MoE: Qwen3-VL with experts, two of four for each token.

Special: deepstack as in `qwen3_vl`, whose boolean indexing breaks Dynamo's graph behind the first layers. Which expert
a token goes to depends on its hidden state.
"""

import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import ZooModel, build, image_tokens


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = {
        **_qwen.TEXT,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    tower = {
        **_qwen.TOWER,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLMoeConfig(text_config=text, vision_config=tower, **_qwen.IDS)
    return build(Qwen3VLMoeForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="qwen3_vl_moe",
    make=make,
    inputs=_qwen.inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
