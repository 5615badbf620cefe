"""Qwen2-VL: native-resolution tower with full attention per image, 3-D M-RoPE, biased q/k/v, GQA 4/2.

Special: images differ in size (6 and 16 tokens) and travel as one packed list of patches with `image_grid_thw`;
positions need `mm_token_type_ids`; the model keeps `rope_deltas` between forward passes.
"""

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import ZooModel, build, image_tokens


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Qwen2VLConfig(
        text_config=_qwen.TEXT,
        vision_config={**_qwen.TOWER, "embed_dim": 32, "hidden_size": _qwen.TEXT["hidden_size"], "mlp_ratio": 2},
        **_qwen.IDS,
    )
    return build(Qwen2VLForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="qwen2_vl",
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
