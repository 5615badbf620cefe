"""L0: under the identity plan a compiled model equals the eager one, whatever it is built from.

`make test` runs each model once, half of them through Inductor, the other factors spread; `make test-matrix` a part in
which any two of model, door, style, cache and dtype meet, and everything without code generation; `make test-full`
everything else through Inductor.

Tolerances. float32: `FLOAT32_TOLERANCE`, absolute. bfloat16: both the compiled and the eager model are held against the
same model in float32, and the compiled one may be at most three times as far off as the eager one is (plus one
rounding step of a logit): compiled code rounds at other places, and neither is the right one.
"""

import copy
import itertools

import pytest
import torch

from avl_fx.passes.site import Status
from tests.e2e._covering import covering, one_each, rest_in_matrix
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through, whole
from tests.zoo import ZOO
from tests.zoo._run import on, prefill_and_decode

STEPS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHES = ("none", "dynamic", "static")
LOGIT_STEP = 0.0625
"""Spacing of bfloat16 numbers between 8 and 16."""

FACTORS = (tuple(ZOO), DOORS, ("sdpa", "eager"), CACHES, tuple(DTYPES))
FRAGMENTED = {("qwen3_vl", "torch.compile")}
"""Models whose decoder bare torch.compile breaks into one graph a layer, the rest of it eager (recompile limit)."""


def _allowed(case):
    name, _, _, cache, _ = case
    return cache in ZOO[name].caches


MATRIX = [
    (name, door, style, cache, dtype)
    for name in FACTORS[0]
    for door in FACTORS[1]
    for style in FACTORS[2]
    for cache in FACTORS[3]
    for dtype in FACTORS[4]
    if _allowed((name, door, style, cache, dtype))
]
CHOSEN = one_each(MATRIX)
"""What `make test` runs: each model once, the other factors spread."""
COMPILED = [case for case in CHOSEN if case[0] in ("llava", "gemma3")]
"""Those of them that `make test` takes through Inductor, whose C++ takes long to compile; the others run op by op."""
COVERING = covering(FACTORS, _allowed)
"""What `make test-matrix` compiles: any two of model, door, style, cache and dtype meet."""


def check(name, door, style, cache, dtype, compiler, device="cpu"):
    """Everything that is promised of one case; returns what was recorded."""
    zoo = ZOO[name]
    model = zoo.make(style, dtype=DTYPES[dtype]).to(device)
    inputs = on(device, zoo.inputs(model, batch=2))
    eager = prefill_and_decode(model, inputs, cache, steps=STEPS)
    with through(door, model, compiler=compiler) as recorder:
        compiled = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=eager.tokens)

    if dtype == "float32":
        assert largest(compiled, eager) <= FLOAT32_TOLERANCE
    else:
        exact_model = copy.deepcopy(model).float()
        exact_inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        exact = prefill_and_decode(exact_model, exact_inputs, cache, steps=STEPS, tokens=eager.tokens)
        assert largest(compiled, exact) <= 3 * largest(eager, exact) + LOGIT_STEP

    graphs = decoder_graphs(recorder)
    assert all(g.failure is None for g in recorder.graphs)
    assert graphs
    for site in (s for g in graphs for s in decoder_sites(g)):
        assert site.status is Status.REWRITTEN, site
        assert (site.heads, site.kv_heads, site.head_dim) == (zoo.heads, zoo.kv_heads, zoo.head_dim)
        assert (site.kind == "cross") == (zoo.attention_kinds[site.layer] == "cross")
        assert (site.cache != "none") == (cache != "none") or site.kind == "cross"
    # Nothing of the vision encoder is taken for the decoder: layers are counted, and their paths are the decoder's.
    suffix = zoo.decoder_prefix.split(".")[-1]
    if (name, door) in FRAGMENTED:
        # Without a cache Dynamo compiles the first layer's graph and uses it for all of them.
        expected = {0} if cache == "none" else set(range(7))
        assert {s.layer for g in graphs for s in decoder_sites(g)} >= expected
    else:
        assert whole(zoo, recorder)
        assert all(s.tower.split(".")[-1] == suffix for g in graphs for s in decoder_sites(g))
    if door == "avl_fx.compile" and cache != "none":
        # One decoder graph for the prompt, one for the first decode step, and with a dynamic cache one for the rest.
        # The hand-written model's prompt does not show that it starts a cache: that gets room two steps later.
        queries = [decoder_sites(g)[0].queries for g in graphs]
        assert sum(q != 1 for q in queries) == 1
        assert sum(q == 1 for q in queries) in ((1, 2, 3) if name == "plain_lvlm" else (1, 2))
    if recorder.visual:
        # Whatever the front door, the positions that reach the decoder are the ground truth.
        assert torch.equal(recorder.visual[0], zoo.visual_positions(model, inputs))
    else:
        # Splicing by index leaves no mask in any graph: unknown, and never guessed.
        assert name in ("plain_lvlm", "mllama")
    return recorder


@pytest.mark.parametrize("case", rest_in_matrix(CHOSEN, COMPILED), ids="-".join)
def test_identity_equals_eager_through_inductor(case):
    check(*case, compiler="inductor")


@pytest.mark.matrix
@pytest.mark.parametrize("case", [c for c in COVERING if c not in CHOSEN], ids="-".join)
def test_identity_equals_eager_through_inductor_pairwise(case):
    check(*case, compiler="inductor")


@pytest.mark.parametrize("case", rest_in_matrix(MATRIX, [c for c in CHOSEN if c not in COMPILED]), ids="-".join)
def test_identity_equals_eager(case):
    check(*case, compiler="eager")


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in MATRIX if c not in COVERING], ids="-".join)
def test_identity_equals_eager_through_inductor_everywhere(case):
    check(*case, compiler="inductor")


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["llava", "plain_lvlm", "mllama"])
def test_identity_equals_eager_through_aot(name):
    check(name, "avl_fx.compile", "sdpa", "dynamic", "float32", compiler="aot_eager")


def test_every_pair_is_covered():
    def meetings(case):
        return set(itertools.combinations(enumerate(case), 2))

    seen = set().union(*map(meetings, COVERING))
    assert all(meetings(case) <= seen for case in MATRIX)
    assert {case[0] for case in COVERING} == set(ZOO)
