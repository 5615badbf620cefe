"""L1 in decode: lazy layers take their anchor's logits and read no keys, on every cache and with every plan on top.

The caches of tests are so short that ATen is faster, so the limit is taken away here.
"""

import pytest
import torch

from avl_fx import Plan
from tests._compiler import needs_compiler
from tests.e2e._covering import one_each, rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.oracle import avl_oracle, lazy_oracle
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

pytestmark = [needs_compiler, pytest.mark.usefixtures("short_caches_too", "one_thread")]

STEPS = 16
CASES = [
    (name, ("torch.compile", "avl_fx.compile")[number % 2], ("sdpa", "eager")[number // 2 % 2], cache)
    for number, (name, cache) in enumerate(
        (name, cache)
        for name in ("llava", "qwen2_5_vl", "gemma3", "mllama", "plain_lvlm", "internvl")
        for cache in ("dynamic", "static")
        if cache in ZOO[name].caches
    )
]


def inheriting(recorder):
    """Sites that take their anchor's logits, of each decoder graph of one query."""
    decode = [g for g in decoder_graphs(recorder) if decoder_sites(g)[0].queries == 1]
    return [sum(p.count for p in g.passes if p.name == "inherit_scores") for g in decode]


@pytest.mark.parametrize("case", rest_in_matrix(CASES, one_each(CASES)[::2]), ids="-".join)
def test_equals_the_oracle_over_16_steps(case):
    name, door, style, cache = case
    zoo = ZOO[name]
    model = zoo.make(style)
    inputs = zoo.inputs(model, batch=2)
    blocks = [(0, 1), (2, zoo.decoder_layers - 1)]
    dense = prefill_and_decode(model, inputs, cache, steps=STEPS)
    with lazy_oracle(model, blocks, zoo.decoder_prefix, zoo.attention_kinds) as oracle:
        expected = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=dense.tokens)
    with through(door, model, compiler="eager", plan=Plan.lazy(blocks)) as recorder:
        got = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=dense.tokens)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert largest(got, dense) > 100 * FLOAT32_TOLERANCE
    # Nobody's keys but the anchor's are read: all that is lazy inherits.
    assert set(inheriting(recorder)) == {len(oracle.lazy)}


@pytest.mark.parametrize(
    ("cache", "compiler"),
    [
        ("dynamic", "aot_eager"),
        pytest.param("static", "inductor", marks=pytest.mark.matrix),
        pytest.param("dynamic", "inductor", marks=pytest.mark.matrix),
        pytest.param("static", "aot_eager", marks=pytest.mark.matrix),
    ],
)
def test_what_goes_to_the_compiler_has_one_product_with_keys_a_block(cache, compiler):
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    last = zoo.decoder_layers - 1
    dense = prefill_and_decode(model, inputs, cache, steps=4)
    with lazy_oracle(model, [(0, last)], zoo.decoder_prefix, zoo.attention_kinds):
        expected = prefill_and_decode(model, inputs, cache, steps=4, tokens=dense.tokens)
    with through("torch.compile", model, compiler=compiler, plan=Plan.lazy([(0, last)])) as recorder:
        got = prefill_and_decode(model, inputs, cache, steps=4, tokens=dense.tokens)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert set(inheriting(recorder)) == {last}


@pytest.mark.parametrize(
    ("name", "cache"),
    rest_in_matrix(
        [(name, cache) for name in ("llava", "qwen2_5_vl") for cache in ("dynamic", "static")],
        [("llava", "dynamic")],
        apart=True,
    ),
)
def test_under_a_plan_that_reads_less(name, cache):
    """One choice of core, and one row of logits, for a block; over refreshes and under a text window."""
    zoo = ZOO[name]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    blocks = [(1, zoo.decoder_layers - 1)]
    settings = {"core": 0.3, "secondary": 0.5, "refresh": 3}
    plan = Plan.avl(**settings, text=0.5, text_minimum=4).combine(Plan.lazy(blocks))
    visual = zoo.visual_positions(model, inputs)
    dense = prefill_and_decode(model, inputs, cache, steps=8)
    where = {"decoder_prefix": zoo.decoder_prefix, "kinds": zoo.attention_kinds}
    with avl_oracle(model, visual, **settings, text=0.5, minimum=4, blocks=blocks, **where):
        expected = prefill_and_decode(model, inputs, cache, steps=8, tokens=dense.tokens)
    with through("torch.compile", model, compiler="eager", plan=plan) as recorder:
        got = prefill_and_decode(model, inputs, cache, steps=8, tokens=dense.tokens)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert set(inheriting(recorder)) == {zoo.decoder_layers - 2}


def test_keys_of_lazy_layers_may_be_anything():
    """What is not read cannot matter: buffers of lazy layers hold NaN, and the result has none."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    with through("torch.compile", model, compiler="eager", plan=Plan.lazy([(0, 3)])):
        got = prefill_and_decode(model, inputs, "static", steps=3)
    assert all(torch.isfinite(logits).all() for logits in got)
    assert all(got.cache.layers[i].keys.isnan().all() for i in (1, 2, 3))
