"""HunYuan-VL: a tower on packed patches of any size, HunYuan decoder that norms q and k behind RoPE (GQA 4/2).

Special: four axes of M-RoPE: place in the text, width, height, and which image it is. Each row of merged patches ends
in a learned newline, and learned tokens stand before and behind each image: 2 x (3+1) + 2 = 10 and 4 x (4+1) + 2 = 22.
"""

import functools

import torch
from transformers import HunYuanVLConfig, HunYuanVLForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import DECODER, IMAGE, VISION, ZooModel, build, image_tokens

TEXT = {
    **DECODER,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]},
}
TOWER = {
    **VISION,
    "patch_size": _qwen.PATCH,
    "spatial_merge_size": _qwen.MERGE,
    "max_image_size": 32,
    "out_hidden_size": TEXT["hidden_size"],
    "text_hidden_size": TEXT["hidden_size"],
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = HunYuanVLConfig(text_config=TEXT, vision_config=TOWER, image_token_id=IMAGE, tie_word_embeddings=False)
    return build(HunYuanVLForConditionalGeneration, config, attn_implementation, dtype, seed)


def tokens_of(t, h, w):
    return h // _qwen.MERGE * (w // _qwen.MERGE + 1) + 2


MODEL = ZooModel(
    name="hunyuan_vl",
    make=make,
    inputs=functools.partial(_qwen.inputs, tokens_of=tokens_of, frames=1),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
