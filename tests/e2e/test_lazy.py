"""L1: a lazy plan equals the independent eager oracle of `tests.oracle`, on every model of the zoo.

Blocks: the whole decoder (layer 0 anchors, the last layer is lazy), and two blocks. Layers that cannot be lazy (another
kind of attention than the anchor) are refused with a reason and stay dense, in the oracle and here alike.
"""

import pytest
import torch

from avl_fx import Plan
from avl_fx.dropped_keys import is_dropped
from avl_fx.passes.site import Reason, Status
from tests.e2e._covering import one_each, rest_in_matrix
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.e2e.test_identity import CACHES, FRAGMENTED
from tests.oracle import lazy_oracle
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS = 4
LAYOUTS = ("all", "two")

CASES = [
    (name, door, style, cache, layout)
    for name, zoo in ZOO.items()
    for door in DOORS
    for style in ("sdpa", "eager")
    for cache in CACHES
    for layout in LAYOUTS
    if cache in zoo.caches and (name, door) not in FRAGMENTED
]
CHOSEN = one_each(CASES)[1::2]
"""What `make test` runs: half of the models once, the other factors spread; `test_lazy_modes` takes the other half."""
COMPILED = [
    ("llava", "torch.compile", "sdpa", "dynamic", "two"),
    ("llava", "torch.compile", "eager", "static", "all"),
    ("gemma3", "avl_fx.compile", "sdpa", "static", "two"),
]


def blocks_of(layout, layers):
    return [(0, layers - 1)] if layout == "all" else [(0, 1), (2, layers - 1)]


def check(name, door, style, cache, layout, compiler):
    zoo = ZOO[name]
    model = zoo.make(style)
    inputs = zoo.inputs(model, batch=2)
    blocks = blocks_of(layout, zoo.decoder_layers)
    dense = prefill_and_decode(model, inputs, cache, steps=STEPS)
    with lazy_oracle(model, blocks, zoo.decoder_prefix, zoo.attention_kinds) as oracle:
        expected = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=dense.tokens)
    with through(door, model, compiler=compiler, plan=Plan.lazy(blocks)) as recorder:
        got = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=dense.tokens)

    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert largest(got, dense) > 100 * FLOAT32_TOLERANCE, "a lazy plan that changes nothing proves nothing"
    for graph in decoder_graphs(recorder):
        sites = decoder_sites(graph)
        lazy = sorted(s.layer for s in sites if s.action.startswith("lazy"))
        assert lazy == sorted(oracle.lazy)
        refused = {s.layer for s in sites if s.status is Status.REFUSED}
        kinds = zoo.attention_kinds
        plan = Plan.lazy(blocks).lazy_policy
        assert refused == {i for i in plan.lazy_layers if i not in oracle.lazy}
        assert all(s.reason is Reason.ANCHOR_KIND for s in sites if s.layer in refused)
        assert all(kinds[i] != kinds[plan.anchor_of(i)] or kinds[i] == "cross" for i in refused)
        # q_proj and k_proj of every lazy layer are gone from what the compiler receives.
        assert graph.linears["before"] - graph.linears["after"] == 2 * len(lazy)
    if cache != "none":
        _check_cache(zoo, got.cache, expected.cache, oracle, inputs["attention_mask"].bool().all(dim=1))


def _check_cache(zoo, got, expected, oracle, rows):
    """Values of all layers and keys of all but the lazy ones are the oracle's; keys of lazy ones are marked.

    Compared on ``rows`` without padding: a padding position sees no key, and what attention gives there is nobody's
    business (SDPA says zero, an explicit softmax says the mean).
    """
    assert rows.any()
    if zoo.hf:
        pairs = [
            (i, a, b)
            for i, (a, b) in enumerate(zip(got.layers, expected.layers, strict=True))
            if zoo.attention_kinds[i] != "cross"
        ]
        tensors = [(i, a.keys, a.values, b.keys, b.values) for i, a, b in pairs]
    else:
        tensors = [(i, *got[2 * i : 2 * i + 2], *expected[2 * i : 2 * i + 2]) for i in range(zoo.decoder_layers)]
    for layer, keys, values, expected_keys, expected_values in tensors:
        assert torch.allclose(values[rows], expected_values[rows], atol=FLOAT32_TOLERANCE)
        assert keys.shape == expected_keys.shape
        assert is_dropped(keys) == (layer in oracle.lazy)
        if layer in oracle.lazy:
            assert keys.isnan().all()
        else:
            assert torch.allclose(keys[rows], expected_keys[rows], atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("case", CHOSEN, ids="-".join)
def test_lazy_equals_oracle(case):
    check(*case, compiler="eager")


@pytest.mark.parametrize("case", rest_in_matrix(COMPILED, COMPILED[1:2]), ids="-".join)
def test_lazy_equals_oracle_through_inductor(case):
    check(*case, compiler="inductor")


@pytest.mark.matrix
@pytest.mark.parametrize("case", [c for c in CASES if c not in CHOSEN], ids="-".join)
def test_lazy_equals_oracle_everywhere(case):
    check(*case, compiler="eager")


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in CASES if c not in COMPILED], ids="-".join)
def test_lazy_equals_oracle_through_inductor_everywhere(case):
    check(*case, compiler="inductor")


@pytest.mark.parametrize(("name", "door"), sorted(FRAGMENTED))
def test_fragmented_decoder_refuses_and_stays_right(name, door):
    """One graph a layer: no anchor is in reach, so the prefill is dense and exact, and says why."""
    zoo = ZOO[name]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    dense = prefill_and_decode(model, inputs, "dynamic", steps=0)
    with through(door, model, compiler="eager", plan=Plan.lazy([(0, 3)])) as recorder:
        got = prefill_and_decode(model, inputs, "dynamic", steps=0, tokens=dense.tokens)
    assert largest(got, dense) <= FLOAT32_TOLERANCE
    sites = [s for g in decoder_graphs(recorder) for s in decoder_sites(g)]
    refused = {s.layer: s.reason for s in sites if s.status is Status.REFUSED}
    assert refused == {1: Reason.ANCHOR_ELSEWHERE, 2: Reason.ANCHOR_ELSEWHERE, 3: Reason.ANCHOR_ELSEWHERE}
