"""Qwen3.5: a hybrid decoder, gated delta nets (linear attention) and full attention with a gate on its output.

Special: a linear layer keeps a convolution's window and a recurrent state instead of keys, and hides padding from them;
it runs chunks of the prompt one after another. Full layers norm q and k, rotate a quarter of each head by interleaved
M-RoPE, and `q_proj` makes the gate as well. Vision as in Qwen3-VL without deepstack.
"""

import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import ZooModel, build, image_tokens

KINDS = ("none", "full", "none", "full", "full")
LAYERS = {"none": "linear_attention", "full": "full_attention"}


TEXT = {
    **_qwen.TEXT,
    "num_hidden_layers": len(KINDS),
    "layer_types": [LAYERS[kind] for kind in KINDS],
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
TOWER = {
    **_qwen.TOWER,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": TEXT["hidden_size"],
    "num_position_embeddings": 16,
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Qwen3_5Config(text_config=TEXT, vision_config=TOWER, **_qwen.IDS)
    return build(Qwen3_5ForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="qwen3_5",
    make=make,
    inputs=_qwen.inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vision_sites=2,
    mixed_sizes=True,
)
