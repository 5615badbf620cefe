"""MiniMax M3: CLIP-like tower on packed patches of any size; dense and sparse layers with experts (GQA 4/2).

Special: a sparse layer's indexer, with one head a key/value head and a cache of its own keys, masks all but the block
of 8 keys that the query stands in and the best others, 4 in all. Blocks are counted from the first slot of the cache:
padding moves them. q and k are normed by 1 + weight, half of each head is rotated. The first layer's MLP is dense.
"""

import dataclasses

import torch
from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig

from tests.families import exaone4_5
from tests.zoo import _qwen
from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION, build

LAYERS = ("full_attention", "full_attention", "minimax_m3_sparse", "minimax_m3_sparse")
TEXT = {
    **DECODER,
    "head_dim": 16,
    "rotary_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "layer_types": list(LAYERS),
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 96,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 8,
    "index_topk_blocks": 4,
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = MiniMaxM3VLConfig(
        text_config=TEXT,
        vision_config={**VISION, "image_size": 32, "patch_size": _qwen.PATCH},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=48,
    )
    return build(MiniMaxM3SparseForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(
    exaone4_5.MODEL,
    name="minimax_m3_vl",
    make=make,
    attention_kinds=("full",) * len(LAYERS),
    padding_exact=False,
    notes="Blocks of keys are counted from the first slot of the cache, padding included.",
)
