"""Qwen2.5-VL: as Qwen2-VL, with a tower of windowed and full layers.

Special: tower layer 0 attends within windows of 2 x 2 merged patches, layer 1 within the image, and each runs one
attention call per window or image. M-RoPE, packed patches and `rope_deltas` as in Qwen2-VL.
"""

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import ZooModel, build, image_tokens


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    tower = {
        **_qwen.TOWER,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": _qwen.TEXT["hidden_size"],
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config=_qwen.TEXT, vision_config=tower, **_qwen.IDS)
    return build(Qwen2_5_VLForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="qwen2_5_vl",
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
