"""Muse Glimmer: a tower of window layers and full ones, decoder of three sliding layers and a full one (GQA 4/2).

Special: q and k share a norm without weights, and q is scaled behind it. Sliding layers rotate, full ones have no
positions (NoPE). What attention gives is gated, layers have four norms, and embeddings are normed. The tower sees
patches row by row and merges two by two behind its last layer. Image tokens are looked up as padding before features
replace them. Logits are capped.
"""

import dataclasses

import torch
from transformers import MuseGlimmerConfig, MuseGlimmerForConditionalGeneration

from tests.families import exaone4_5
from tests.zoo import _qwen
from tests.zoo._base import DECODER, VISION, build

KINDS = exaone4_5.KINDS
LAYERS = {"full": "full_attention", "sliding": "sliding_attention"}
TEXT = {
    **{**DECODER, "num_hidden_layers": len(KINDS)},
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": [LAYERS[kind] for kind in KINDS],
    "output_multiplier": 1.0,
}
TOWER = {
    **{**VISION, "num_hidden_layers": 3},
    "layer_types": ["window_attention", "window_attention", "full_attention"],
    "patch_size": _qwen.PATCH,
    "patch_temporal": _qwen.TEMPORAL,
    "merge_size": _qwen.MERGE,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = MuseGlimmerConfig(
        text_config=TEXT,
        vision_config=TOWER,
        image_token_id=_qwen.IDS["image_token_id"],
        video_token_id=_qwen.IDS["video_token_id"],
        out_hidden_size=TOWER["hidden_size"] * _qwen.MERGE**2,
        projector_hidden_size=48,
    )
    return build(MuseGlimmerForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(exaone4_5.MODEL, name="muse_glimmer", make=make, vision_sites=3)
