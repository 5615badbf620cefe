"""Mistral Large 4: Pixtral tower, a decoder of latent attention whose indexer picks the keys of each query, experts.

Special: the cache holds latents (24 numbers and a rotated key of 8 a token) as in `kimi_k25`. Indexers of layers 0, 1
and 4 pick 24 tokens of those before a query, and layers 2, 3 and 5 take what the last of them picked. Layers 1, 3 and
5 have no positions (NoPE). Layers 2 and 3 expand keys and values from latents of layers 0 and 1. Queries are scaled by
the logarithm of where they stand, logits are capped.
"""

import dataclasses

import torch
from transformers import MistralLarge4Config, MistralLarge4ForConditionalGeneration, PixtralVisionConfig
from transformers.models.mistral_large4 import MistralLarge4TextConfig

from tests.zoo import mistral3
from tests.zoo._base import DECODER, IMAGE, VISION, build

LAYERS = 6


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = MistralLarge4TextConfig(
        **{**DECODER, "num_hidden_layers": LAYERS, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        index_topk=24,
        index_head_dim=16,
        index_n_heads=16,
        indexer_types=["full", "full", "shared", "shared", "full", "shared"],
        no_rope_layers=[1, 0] * (LAYERS // 2),
        kv_source_layers=[0, 1, 0, 1, 4, 5],
    )
    config = MistralLarge4Config(
        vision_config=PixtralVisionConfig(**VISION, image_size=max(mistral3.LARGEST), patch_size=mistral3.PATCH),
        text_config=text,
        image_token_index=IMAGE,
        spatial_merge_size=mistral3.MERGE,
    )
    return build(MistralLarge4ForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(
    mistral3.MODEL,
    name="mistral_large4",
    make=make,
    attention_kinds=("full",) * LAYERS,
    kv_heads=4,
)
