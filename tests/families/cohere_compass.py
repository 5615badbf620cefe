"""Cohere Compass (North Micro Vision): Qwen3-VL's tower and deepstack, decoder of `cohere2_vision` (GQA 4/2).

Special: attention and MLP of a layer read the same norm and are added together (parallel block). Sliding layers rotate
by interleaved M-RoPE, full ones have no positions at all (NoPE). Features of two layers of the tower are added behind
decoder layers 0 and 1 by boolean indexing. Norms are LayerNorms without a bias. Logits are scaled.
"""

import dataclasses

import torch
from transformers import CohereCompassConfig, CohereCompassForConditionalGeneration

from tests.families import cohere2_vision
from tests.zoo import _qwen, qwen3_vl
from tests.zoo._base import DECODER, build

KINDS = cohere2_vision.KINDS
TEXT = {
    **DECODER,
    "num_hidden_layers": len(KINDS),
    "layer_types": [f"{kind}_attention" for kind in KINDS],
    "sliding_window": 8,
    "logit_scale": 0.25,
    "rope_parameters": {
        "sliding_attention": {**_qwen.TEXT["rope_parameters"], "mrope_interleaved": True},
        "full_attention": None,
    },
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = CohereCompassConfig(text_config=TEXT, vision_config=qwen3_vl.TOWER, **_qwen.IDS)
    return build(CohereCompassForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(qwen3_vl.MODEL, name="cohere_compass", make=make, attention_kinds=KINDS)
