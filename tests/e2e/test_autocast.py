"""Under autocast a rewritten model is as near to the float32 answer as the oracle under autocast is.

Rotary embeddings leave queries and keys in float32 there and values in half precision, so that a cache holds both. Two
ways of computing in half precision round at different places: as in `test_identity`, the compiled model may be at most
three times as far from the float32 oracle as the oracle itself is under autocast.
"""

import contextlib

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from avl_fx import AVLCache, Plan
from avl_fx.errors import CacheStateError
from avl_fx.passes.site import Status
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import decoder_graphs, decoder_sites, largest, through
from tests.e2e.test_identity import LOGIT_STEP
from tests.oracle import avl_oracle, lazy_oracle
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS = 6
BLOCKS = [(1, 3)]
SHARES = {"core": 0.3, "secondary": 0.5, "refresh": 3, "text": 0.6}
PLANS = {
    "identity": Plan.identity(),
    "gla": Plan.lazy(BLOCKS),
    "vla": Plan.lazy(BLOCKS, "vla"),
    "vla_scores": Plan.lazy(BLOCKS, "vla_scores"),
    "avl": Plan.avl(**SHARES),
}


def oracle_of(plan, model, visual):
    if plan == "identity":
        return contextlib.nullcontext()
    if plan == "avl":
        return avl_oracle(model, visual, **SHARES)
    return lazy_oracle(model, BLOCKS, mode=plan, visual=visual)


CASES = [(plan, cache) for plan in PLANS for cache in ("none", "dynamic") if (plan, cache) != ("avl", "none")]
"""Not static caches: eager transformers cannot store two dtypes in one. Partitions need a cache."""


def check(plan, cache, compiler):
    zoo = ZOO["llava"]
    model = zoo.make("sdpa")
    inputs = zoo.inputs(model, batch=3)
    visual = zoo.visual_positions(model, inputs)
    tokens = prefill_and_decode(model, inputs, cache, steps=STEPS).tokens
    with oracle_of(plan, model, visual):
        exact = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=tokens)
    half = torch.autocast("cpu", torch.bfloat16)
    with oracle_of(plan, model, visual), half:
        expected = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=tokens)
    with through("avl_fx.compile", model, compiler=compiler, plan=PLANS[plan]) as recorder, half:
        got = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=tokens)
    assert largest(got, exact) <= 3 * largest(expected, exact) + LOGIT_STEP
    sites = [s for g in decoder_graphs(recorder) for s in decoder_sites(g)]
    assert {(s.status, s.dtype) for s in sites} == {(Status.REWRITTEN, "bfloat16")}
    assert stored_dtypes(got.cache) == stored_dtypes(expected.cache)
    return recorder


def stored_dtypes(cache):
    return [] if cache is None else [(layer.keys.dtype, layer.values.dtype) for layer in cache.layers]


CHOSEN = [("gla", "none"), ("avl", "dynamic")]


@pytest.mark.parametrize("case", rest_in_matrix(CASES, CHOSEN), ids="-".join)
def test_as_near_to_float32_as_the_oracle(case):
    check(*case, "eager")


@pytest.mark.matrix
def test_as_near_to_float32_as_the_oracle_through_inductor():
    check("gla", "dynamic", "inductor")


@pytest.mark.parametrize("plan", rest_in_matrix([*PLANS], ["identity", "gla"]))
def test_a_cache_of_two_dtypes(plan, monkeypatch):
    """Before transformers 5.24 values are stored in the dtype of keys."""

    def apart(layer, keys, values):
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = (torch.tensor([], dtype=x.dtype, device=x.device) for x in (keys, values))

    monkeypatch.setattr(DynamicLayer, "lazy_initialization", apart)
    check(plan, "dynamic", "eager")


def test_a_compact_cache_that_would_have_to_be_cast_is_refused():
    """Its rows are found at the place where attention reads the cache itself, and autocast reads a cast of it."""
    zoo = ZOO["llava"]
    model = zoo.make("sdpa")
    inputs = zoo.inputs(model, batch=3)
    cache = AVLCache(PLANS["avl"], model.config)
    with (
        through("avl_fx.compile", model, compiler="eager", plan=PLANS["avl"]),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(CacheStateError, match="a graph was refused its rewrite"),
    ):
        prefill_and_decode(model, inputs, cache, steps=STEPS)
