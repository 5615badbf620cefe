"""GLM-5.3-Flash: a tower that norms queries and keys; a decoder of Kimi's delta attention and sparse latent attention.

Special: a linear layer keeps a convolution's window and a recurrent state. A layer that attends caches latents (one row
of 24 numbers for all heads, MHA 4/4, no positions: NoPE) and an indexer's keys beside them; the indexer averages pools
of 4 tokens and masks what is not in the 6 best pools of a query or in the pool that is not full yet. Four residual
streams instead of one. Images and videos have one placeholder; start and end tokens tell which it is.
"""

import dataclasses

import torch
from transformers import Glm5NextConfig, Glm5NextForConditionalGeneration

from tests.families import glm4v, glm4v_moe
from tests.zoo._base import DECODER, IMAGE, build

KINDS = ("none", "full", "full", "full")
LAYERS = {"none": "linear_attention", "full": "indexed_attention"}
VIDEO_START, VIDEO_END = 248, 249
TEXT = {
    **DECODER,
    "num_hidden_layers": len(KINDS),
    "layer_types": [LAYERS[kind] for kind in KINDS],
    "mlp_layer_types": ["dense", *["sparse"] * (len(KINDS) - 1)],
    "num_key_value_heads": 4,
    **glm4v_moe.EXPERTS,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 24,
    "index_kpool": 4,
    "index_head_dim": 8,
    "index_n_heads": 8,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "hc_sinkhorn_iters": 4,
}
IDS = {**glm4v.IDS, "video_token_id": IMAGE, "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Glm5NextConfig(text_config=TEXT, vision_config={**glm4v.TOWER, "projection_intermediate_size": 48}, **IDS)
    return build(Glm5NextForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(glm4v.MODEL, name="glm5_next", make=make, attention_kinds=KINDS, kv_heads=4)
