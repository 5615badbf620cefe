"""What transformers itself writes: its attention functions, its caches. All of it must be recognised."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from avl_fx.passes.site import Status
from tests.passes._graphs import check, counts

FUNCTIONS = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}
PAST, NEW, HEADS, DIM = 4, 3, 4, 8


class Attention(nn.Module):
    """A transformers attention layer without its projections."""

    is_causal = True

    def __init__(self, function: str, groups: int, cached: str) -> None:
        super().__init__()
        self.function, self.num_key_value_groups, self.cached = FUNCTIONS[function], groups, cached
        self.scaling, self.attention_dropout = DIM**-0.5, 0.1

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cache: Any) -> Any:
        if cache is not None:
            key, value = cache.update(key, value, 0)
        dropout = 0.0 if not self.training else self.attention_dropout
        out, _ = self.function(self, query, key, value, mask, scaling=self.scaling, dropout=dropout)
        stored = [] if cache is None else [cache.layers[0].keys, cache.layers[0].values]
        return out.reshape(*query.shape[:1], query.shape[2], -1).contiguous(), *stored


def make_cache(kind: str, kv_heads: int, filled: int) -> Any:
    if kind == "none":
        return None
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=kv_heads, hidden_size=HEADS * DIM
    )
    cache = (
        DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=PAST + NEW + 2)
    )
    if filled:
        cache.update(*(tensor(kv_heads, filled, seed) for seed in (5, 6)), 0)
    return cache


def tensor(heads: int, length: int, seed: int) -> Tensor:
    return torch.randn(2, length, heads, DIM, generator=torch.Generator().manual_seed(seed)).transpose(1, 2)


def make_mask(kind: str, queries: int, keys: int, seen: int) -> Tensor | None:
    """Causal, with the first two keys of row 1 padded and the unused end of a static cache hidden."""
    if kind == "none":
        return None
    rows = torch.arange(queries)[:, None] + seen - queries
    visible = (torch.arange(keys)[None] <= rows)[None, None].repeat(2, 1, 1, 1)
    visible[1, ..., :2] = False
    if kind == "bool":
        return visible
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


GRID = list(
    itertools.product(
        FUNCTIONS, (1, 2, 4), ("none", "dynamic", "static"), ("prefill", "decode"), ("none", "bool", "additive")
    )
)


@pytest.mark.parametrize(
    ("function", "groups", "cached", "phase", "masked"),
    [g for g in GRID if not (g[0] == "eager" and g[4] == "bool") and not (g[2] == "none" and g[3] == "decode")],
)
def test_every_attention_of_transformers(function: str, groups: int, cached: str, phase: str, masked: str) -> None:
    queries = NEW if phase == "prefill" else 1
    filled = PAST if phase == "decode" else 0
    kv_heads = HEADS // groups
    seen = filled + queries
    keys = PAST + NEW + 2 if cached == "static" else seen
    rewritten = check(
        Attention(function, groups, cached).eval(),
        tensor(HEADS, queries, 1),
        tensor(kv_heads, queries, 2),
        tensor(kv_heads, queries, 3),
        make_mask(masked, queries, keys, seen),
        make_cache(cached, kv_heads, filled),
    )
    site = rewritten.site
    assert site.status is Status.REWRITTEN, f"{site.reason} {site.detail}"
    assert (site.heads, site.kv_heads, site.head_dim) == (HEADS, kv_heads, DIM)
    assert site.cache == cached
    causal_flag = function == "sdpa" and masked == "none" and phase == "prefill"
    assert site.mask == ("causal" if causal_flag else masked)
    left = counts(rewritten.gm)
    assert left["scaled_dot_product_attention"] == 1
    assert not left["softmax"]
    assert not left["expand"], "no key is repeated"
