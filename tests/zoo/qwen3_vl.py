"""Qwen3-VL: deepstack, normed q and k, interleaved M-RoPE, 12 decoder layers with GQA 4/2.

Special: features of both tower layers are *added* to the hidden states at image positions after decoder layers 0 and 1,
by boolean indexing, which breaks Dynamo's graph at every layer; 12 layers are more than its `recompile_limit` of 8.
"""

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import ZooModel, build, image_tokens

LAYERS = 12
TOWER = {
    **_qwen.TOWER,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": _qwen.TEXT["hidden_size"],
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = {**_qwen.TEXT, "num_hidden_layers": LAYERS, "intermediate_size": 64, "head_dim": 16}
    text.pop("tie_word_embeddings")
    config = Qwen3VLConfig(text_config=text, vision_config=TOWER, **_qwen.IDS)
    return build(Qwen3VLForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="qwen3_vl",
    make=make,
    inputs=_qwen.inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * LAYERS,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
