"""Formulas of what a plan saves, against graphs and caches as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, EncoderDecoderCache

import avl_fx
from avl_fx.dropped_keys import Nans, marker
from avl_fx.growing import longer, reserve
from avl_fx.savings import (
    LayerShape,
    attention_flops,
    cache_bytes,
    compact_cache_bytes,
    dense_cache_bytes,
    key_bytes,
    kv_bytes,
    projection_flops,
    rope_flops,
    scoring_flops,
    spare_bytes,
)
from tests.avl_fx._explained import BLOCK, LAZY, TOKENS, explained, own_loop, zoo_model
from tests.zoo import get
from tests.zoo._run import prefill_and_decode

HIDDEN, FLOAT = 64, 4
BATCH = 2


pytestmark = pytest.mark.usefixtures("one_thread")


def prompt(name: str) -> int:
    return get(name).inputs(zoo_model(name), BATCH)["input_ids"].shape[1]


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def test_formulas_count_what_torch_counts():
    x, weight = torch.rand(7, 24), torch.rand(4 * 8 + 2 * 8, 24)
    with FlopCounterMode(display=False) as counter:
        F.linear(x, weight)
    assert counter.get_total_flops() == projection_flops(7, 24, heads=4, kv_heads=2, head_dim=8)
    q, k, v = torch.rand(3, 4, 5, 8), torch.rand(3, 4, 9, 8), torch.rand(3, 4, 9, 6)
    with FlopCounterMode(display=False) as counter:
        (q @ k.mT).softmax(-1) @ v
    assert counter.get_total_flops() == attention_flops(3, 4, 5, 9, 8, 6)
    with FlopCounterMode(display=False) as counter:
        q[:, :, -2:] @ k.mT
    assert counter.get_total_flops() == scoring_flops(3, 4, 2, 9, 8)
    # x * cos + rotate_half(x) * sin: three for each element.
    assert rope_flops(7, heads=4, kv_heads=2, head_dim=8) == 3 * (7 * 4 * 8 + 7 * 2 * 8)


@pytest.mark.parametrize(
    ("name", "door"), [("llava", "torch.compile"), ("qwen2_5_vl", "avl_fx.compile"), ("plain_lvlm", "torch.compile")]
)
def test_what_graphs_lose_is_the_projections_of_lazy_layers(name, door):
    zoo, report = get(name), explained(name, door)
    assert [s.phase for s in report.savings] == ["prefill", "decode"]
    for savings, queries in zip(report.savings, (prompt(name), 1), strict=True):
        rows, geometry = BATCH * queries, (zoo.heads, zoo.kv_heads, zoo.head_dim)
        assert savings.lazy_layers == LAZY
        lost = savings.linear_before - savings.linear_after
        assert lost == len(LAZY) * projection_flops(rows, HIDDEN, *geometry) > 0
        assert savings.rope_saved == (len(LAZY) * rope_flops(rows, *geometry) if zoo.hf else 0)
        keys = prompt(name) if savings.phase == "prefill" else prompt(name) + TOKENS - 1
        per_layer = attention_flops(BATCH, zoo.heads, queries, keys, zoo.head_dim, zoo.head_dim)
        assert savings.attention == zoo.decoder_layers * per_layer


def test_identity_saves_nothing():
    report = explained("llava", "avl_fx.compile", lazy=False, new_tokens=2, cache_implementation="static")
    assert all(s.linear_before == s.linear_after and not s.rope_saved and not s.lazy_layers for s in report.savings)
    zoo, kv = get("llava"), report.kv
    static = kv_bytes(BATCH, zoo.kv_heads, prompt("llava") + 1, zoo.head_dim, zoo.head_dim, FLOAT)
    assert (kv.kind, kv.plan, kv.dense, kv.dropped_layers) == ("static", kv.dense, 4 * static, ())


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "door"), [("llava", "torch.compile"), ("qwen2_5_vl", "avl_fx.compile")])
def test_bytes_of_the_stock_cache(name, door):
    """The report, the formulas, and the caches that `generate` really makes, dense and under the plan."""
    zoo, kv = get(name), explained(name, door).kv
    length = prompt(name) + TOKENS - 1
    dense = zoo.decoder_layers * kv_bytes(BATCH, zoo.kv_heads, length, zoo.head_dim, zoo.head_dim, FLOAT)
    keys = len(LAZY) * key_bytes(BATCH, zoo.kv_heads, length, zoo.head_dim, FLOAT)
    assert (kv.length, kv.dtype, kv.kind, kv.dropped_layers, kv.measured) == (length, "float32", "dynamic", LAZY, True)
    assert kv.dense == dense
    assert kv.plan == dense - keys + FLOAT  # the marker is one element, for all lazy layers together

    run = prefill_and_decode(zoo_model(name), zoo.inputs(zoo_model(name), BATCH), steps=TOKENS - 1)
    assert cache_bytes(run.cache) == dense_cache_bytes(run.cache) == dense


def test_bytes_of_a_cache_of_the_models_own():
    zoo, caches = get("plain_lvlm"), []

    def run(model, **inputs):
        caches.append(own_loop(model, **inputs)[2])

    model = zoo_model("plain_lvlm")
    plan = avl_fx.Plan.lazy([BLOCK])
    kv = avl_fx.explain(model, plan, run=run, **zoo.inputs(model, BATCH)).kv
    assert not kv.measured
    assert kv.dense == dense_cache_bytes(caches[0])
    assert kv.plan == cache_bytes(caches[0]) - FLOAT
    assert kv.plan == kv.dense * 3 // 4  # two of eight tensors are not stored


def test_no_cache_no_bytes():
    model = zoo_model("llava")
    report = avl_fx.explain(model, new_tokens=1, use_cache=False, **get("llava").inputs(model))
    assert report.kv is None
    assert "KV cache" not in str(report)


def test_each_storage_counts_once():
    base = torch.zeros(4, 6)
    assert cache_bytes([base, base[0], base.T, (base, {"k": base[:, 1:]})]) == 4 * 6 * 4
    assert cache_bytes(base[0]) == 4 * 6 * 4  # a view keeps the whole of it alive
    assert dense_cache_bytes([base, base[0]]) == (4 * 6 + 6) * 4
    assert cache_bytes([torch.zeros(2), torch.zeros(3, dtype=torch.bfloat16)]) == 8 + 6
    for nothing in (None, [], {}, "text", 3, torch.float32):
        assert cache_bytes(nothing) == 0


def test_markers_count_as_one_element():
    values = torch.zeros(2, 3, 50, 16, dtype=torch.bfloat16)
    shared: Nans = {}
    keys = [marker(values, 16, shared), marker(values, 16, shared)]
    assert cache_bytes(keys) == 2
    assert dense_cache_bytes(keys) == 2 * values.numel() * 2


def test_room_behind_the_tokens_is_not_cache():
    rows = torch.zeros(2, 3, 10, 8)
    view = reserve(rows, capacity=64)
    assert cache_bytes([view, view]) == rows.nbytes
    assert spare_bytes([view, view]) == 2 * 3 * 54 * 8 * 4
    newer = longer(view)  # the same buffer, one row more
    assert cache_bytes([view, newer]) == 2 * 3 * 11 * 8 * 4
    assert spare_bytes([newer]) == 2 * 3 * 53 * 8 * 4
    assert spare_bytes([rows, rows[0]]) == 0


def test_a_compact_cache_by_hand():
    layers = [LayerShape(2, 8, 6, 4), LayerShape(1, 16, 10, 2), LayerShape(1, 16, 10, 2)]
    # Rows of the cache: max(10 + int(0.5 * 41), 20 + int(0.5 * 7)) = max(30, 23), for both batch rows.
    assert compact_cache_bytes([10, 20], [41, 7], 0.5, layers[:1]) == 2 * 2 * 30 * (8 + 6) * 4 == 6720
    assert compact_cache_bytes([10, 20], [41, 7], 0.5, layers) == 6720 + 2 * (2 * 1 * 30 * (16 + 10) * 2)
    # The keys of lazy layers are not stored.
    assert compact_cache_bytes([10, 20], [41, 7], 0.5, layers, lazy_layers=(1, 2)) == 6720 + 2 * (2 * 1 * 30 * 10 * 2)
    assert compact_cache_bytes([10, 40], [41, 7], 0.5, layers[:1]) == 2 * 2 * 43 * (8 + 6) * 4  # the other row decides
    # Three visual keys are in both rows: lazy layers own 27 of 30.
    assert compact_cache_bytes([10, 20], [41, 7], 0.5, layers[:1], [0], "vla") == 2 * 2 * (27 * 8 + 30 * 6) * 4
    assert compact_cache_bytes([0], [4], 1.0, layers[:1], [0], "vla_scores") == 2 * (1 * 8 + 4 * 6) * 4  # one stays
    assert compact_cache_bytes([5], [0], 0.5, layers[:1]) == 2 * 5 * 14 * 4
    assert compact_cache_bytes([], [], 0.5, layers) == compact_cache_bytes([5], [3], 0.5, []) == 0
    with pytest.raises(ValueError, match="zip"):
        compact_cache_bytes([5], [3, 4], 0.5, layers)


def test_a_compact_cache_that_keeps_everything_is_a_stock_cache():
    shape = LayerShape(2, 8, 6, 4)
    assert compact_cache_bytes([10, 7], [20, 23], 1.0, [shape] * 3) == 3 * kv_bytes(2, 2, 30, 8, 6, 4)


def test_caches_of_transformers():
    own, cross = DynamicCache(), DynamicCache()
    own.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 4), 0)
    cross.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    assert cache_bytes(own) == dense_cache_bytes(own) == kv_bytes(1, 2, 5, 8, 4, FLOAT)
    assert cache_bytes(EncoderDecoderCache(own, cross)) == cache_bytes(own) + cache_bytes(cross)


def test_modules_and_cycles_do_not_count():
    class Holder:
        pass

    holder = Holder()
    holder.model, holder.own, holder.tensor = torch.nn.Linear(8, 8), holder, torch.zeros(3)
    assert cache_bytes(holder) == 12
