"""Qwen4-Exp: Qwen3.5's tower, a hybrid decoder of gated delta nets and indexed attention (GQA 4/2), experts.

Special: an indexer of one key head picks for each query the best blocks of 4 keys, 24 tokens in all (less than a
prompt), and a mask of that layer's own hides the rest; it loops over rows and queries, so that attention lies in graphs
of its own. Four residual streams are mixed before and behind each part; layer 0 adds embeddings of hashed n-grams.
"""

import dataclasses

import torch
from transformers import Qwen4ExpConfig, Qwen4ExpForConditionalGeneration

from tests.families import qwen3_5, qwen3_5_moe
from tests.zoo import _qwen
from tests.zoo._base import EOS, build

TEXT = {
    **qwen3_5.TEXT,
    **qwen3_5_moe.EXPERTS,
    "layer_types": [kind.replace("full", "indexed") for kind in qwen3_5.TEXT["layer_types"]],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 24,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
    "ple_layer_ids": [1],
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 1,
    "eos_token_id": EOS,
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Qwen4ExpConfig(text_config=TEXT, vision_config=qwen3_5.TOWER, **_qwen.IDS)
    return build(Qwen4ExpForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(qwen3_5.MODEL, name="qwen4_exp", make=make)
