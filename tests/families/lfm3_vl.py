"""LFM3-VL: a tower of gated convolutions over an image's grid and grouped attention (2/1), decoder of LFM3 (GQA 4/2).

Special: of the decoder, convolution layers keep their last six inputs instead of keys, sliding layers rotate whole
heads, full ones half of each. Attention layers norm q and k and gate each head's output. Layers have four norms.
Images of any size, as in `qwen2_vl`, with plain positions.
"""

import dataclasses

import torch
from transformers import Lfm3Config, Lfm3VlConfig, Lfm3VlForConditionalGeneration
from transformers.models.lfm3_vl import Lfm3VlVisionConfig

from tests.families import exaone4_5
from tests.zoo import _qwen
from tests.zoo._base import DECODER, VISION, build

KINDS = ("none", "full", "none", "sliding", "none", "full")
LAYERS = {"none": "conv", "full": "full_attention", "sliding": "sliding_attention"}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Lfm3VlConfig(
        vision_config=Lfm3VlVisionConfig(
            **{**VISION, "num_hidden_layers": 3},
            num_key_value_heads=1,
            layer_types=["conv", "full_attention", "full_attention"],
            patch_size=_qwen.PATCH,
            spatial_merge_size=_qwen.MERGE,
            temporal_patch_size=_qwen.TEMPORAL,
        ),
        text_config=Lfm3Config(
            **{**DECODER, "num_hidden_layers": len(KINDS)},
            head_dim=16,
            sliding_window=8,
            layer_types=[LAYERS[kind] for kind in KINDS],
        ),
        projector_hidden_size=48,
        **_qwen.IDS,
    )
    return build(Lfm3VlForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(exaone4_5.MODEL, name="lfm3_vl", make=make, attention_kinds=KINDS)
