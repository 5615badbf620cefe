"""EXAONE 4.5: Qwen2.5-VL's tower with grouped keys, a decoder of three sliding layers and a full one.

Special: norms stand behind attention and MLP, none before; q and k are normed. Sliding layers rotate, full ones have no
positions at all (NoPE). Plain RoPE: images count as so many tokens.
"""

import torch
from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration, Exaone4Config

from tests.zoo import _qwen
from tests.zoo._base import DECODER, VIDEO, ZooModel, build, image_tokens

KINDS = ("sliding", "sliding", "sliding", "full") * 2
TOWER = {
    **_qwen.TOWER,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": DECODER["hidden_size"],
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "num_key_value_heads": 1,
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Exaone4_5_Config(
        text_config=Exaone4Config(**{**DECODER, "num_hidden_layers": len(KINDS)}, sliding_window=8),
        vision_config=TOWER,
        image_token_id=_qwen.IDS["image_token_id"],
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    return build(Exaone4_5_ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    made = _qwen.inputs(model, batch, seed, first)
    del made["mm_token_type_ids"]
    return made


MODEL = ZooModel(
    name="exaone4_5",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
