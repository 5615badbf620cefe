"""L1 for the lazy modes that ask for visual positions: `vla` and `vla_scores` equal the independent eager oracle.

Every model of the zoo that has visual positions among its keys (all but Mllama), both front doors, both attention
styles, no cache, both stock caches and ours; over 16 decode steps. `gla` has test_lazy.py and test_inherit_scores.py.
"""

import itertools

import pytest
import torch
from transformers import DynamicCache

import avl_fx
from avl_fx import AVLCache, Plan
from avl_fx.passes.site import Reason, Status
from tests.e2e._covering import covering, one_each, rest_in_matrix
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.e2e.test_avl import NAMES, PRESETS, as_oracle, blocks_of, converse
from tests.e2e.test_identity import FRAGMENTED
from tests.oracle import avl_oracle, lazy_oracle
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS = 16
MODES = ("vla", "vla_scores")
CACHES = ("none", "dynamic", "static", "compact")
FACTORS = (NAMES, DOORS, ("sdpa", "eager"), CACHES, MODES)


def _allowed(case):
    name, door, _, cache, _ = case
    if (name, door) in FRAGMENTED or (name == "plain_lvlm" and cache == "compact"):
        return False
    return cache == "compact" or cache in ZOO[name].caches


CHOSEN = one_each(list(filter(_allowed, itertools.product(*FACTORS))))[::2]
"""What `make test` runs: half of the models once, the other factors spread; `test_lazy` takes the other half."""
CASES = covering(FACTORS, _allowed, strength=4)
"""What `make test-matrix` runs besides: any four of them."""
COMPILED = [
    ("llava", "torch.compile", "sdpa", "dynamic", "vla"),
    ("llava", "avl_fx.compile", "eager", "static", "vla_scores"),
    ("llava", "torch.compile", "sdpa", "compact", "vla_scores"),
]


def check(name, door, style, cache, mode, compiler):
    zoo = ZOO[name]
    model = zoo.make(style)
    inputs = zoo.inputs(model, batch=3)
    visual = zoo.visual_positions(model, inputs)
    blocks = blocks_of(zoo)
    plan = Plan.lazy(blocks, mode)
    stock, cache = ("dynamic", AVLCache(plan, model.config)) if cache == "compact" else (cache, cache)
    dense = prefill_and_decode(model, inputs, stock, steps=STEPS)
    where = zoo.decoder_prefix, zoo.attention_kinds
    with lazy_oracle(model, blocks, *where, mode, visual) as oracle:
        expected = prefill_and_decode(model, inputs, stock, steps=STEPS, tokens=dense.tokens)
    with through(door, model, compiler=compiler, plan=plan) as recorder:
        got = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=dense.tokens)

    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert largest(got, dense) > 100 * FLOAT32_TOLERANCE, "a lazy plan that changes nothing proves nothing"
    for graph in decoder_graphs(recorder):
        sites = decoder_sites(graph)
        assert {s.layer: s.anchor for s in sites if s.anchor is not None} == oracle.lazy
        assert all(s.status is Status.REWRITTEN for s in sites if s.anchor is not None or s.action == "anchor")
        assert all(f"lazy, {mode}" in s.action for s in sites if s.anchor is not None)
        # Both modes need queries and keys of text, so every projection stays.
        assert graph.linears["before"] == graph.linears["after"]
    counted = {p.name: p.count for p in decoder_graphs(recorder)[0].passes}
    prompt = "substitute_visual" if mode == "vla" else "inherit_scores"
    assert counted[prompt] == len(oracle.lazy)


@pytest.mark.parametrize("case", CHOSEN, ids="-".join)
def test_equals_the_oracle(case):
    check(*case, compiler="eager")


@pytest.mark.matrix
@pytest.mark.parametrize("case", [c for c in CASES if c not in CHOSEN], ids="-".join)
def test_equals_the_oracle_everywhere(case):
    check(*case, compiler="eager")


@pytest.mark.parametrize("case", rest_in_matrix(COMPILED, COMPILED[2:]), ids="-".join)
def test_equals_the_oracle_through_inductor(case):
    check(*case, compiler="inductor")


# ---- with a plan that reads less -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "preset", "cache"),
    [
        pytest.param("vla", "paper", "dynamic", marks=pytest.mark.matrix),
        pytest.param("vla", "text", "static", marks=pytest.mark.matrix),
        pytest.param("vla", "paper", "compact", marks=pytest.mark.matrix),
        pytest.param("vla", "heavy", "compact", marks=pytest.mark.matrix),
        ("vla_scores", "paper", "static"),
        pytest.param("vla_scores", "tight", "dynamic", marks=pytest.mark.matrix),
        pytest.param("vla_scores", "text", "dynamic", marks=pytest.mark.matrix),
        ("vla_scores", "text", "compact"),
        pytest.param("vla_scores", "heavy", "compact", marks=pytest.mark.matrix),
    ],
)
def test_a_block_has_one_choice_of_keys(mode, preset, cache):
    """A lazy layer reads the rows that its anchor reads, over refreshes and under a text window."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=3)
    visual = zoo.visual_positions(model, inputs)
    blocks = blocks_of(zoo)
    plan = Plan.avl(**{"text": None, **PRESETS[preset]}).combine(Plan.lazy(blocks, mode))
    stock, cache = ("dynamic", AVLCache(plan, model.config)) if cache == "compact" else (cache, cache)
    dense = prefill_and_decode(model, inputs, stock, steps=STEPS)
    settings = {**as_oracle(PRESETS[preset]), "blocks": blocks, "mode": mode}
    with avl_oracle(model, visual, decoder_prefix=zoo.decoder_prefix, kinds=zoo.attention_kinds, **settings):
        expected = prefill_and_decode(model, inputs, stock, steps=STEPS, tokens=dense.tokens)
    with through("torch.compile", model, compiler="eager", plan=plan) as recorder:
        got = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=dense.tokens)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert largest(got, dense) > 10 * FLOAT32_TOLERANCE
    for site in (s for g in decoder_graphs(recorder) for s in decoder_sites(g)):
        assert "partitioned" in site.action


# ---- conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "door"),
    [
        pytest.param((True, True), DOORS[0], id="second image-whole"),
        pytest.param((True, False), DOORS[1], id="text alone-regions"),
        pytest.param((True, False), DOORS[0], id="text alone-whole"),
        pytest.param((True, True), DOORS[1], id="second image-regions"),
    ],
)
@pytest.mark.matrix
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["dynamic", "compact"])
def test_a_second_turn(kind, mode, images, door):
    """What is visual in the cache stays visual for later prompts."""
    check_a_second_turn(kind, mode, images, door)


@pytest.mark.parametrize(
    ("mode", "images", "door"),
    [
        pytest.param("vla", (True, True), DOORS[1], marks=pytest.mark.matrix),
        pytest.param("vla", (True, False), "torch.compile", marks=pytest.mark.matrix),
        ("vla_scores", (True, True), DOORS[0]),
    ],
)
def test_a_second_turn_on_a_compact_cache(mode, images, door):
    """Whose lazy layers have no keys of the first image. The other doors and turns are `matrix`."""
    check_a_second_turn("compact", mode, images, door)


def check_a_second_turn(kind, mode, images, door):
    zoo = ZOO["llava"]
    model = zoo.make()
    made = [zoo.inputs(model, batch=1, seed=seed) for seed in range(2)]
    seen = [zoo.visual_positions(model, inputs) for inputs in made]
    if not images[1]:
        text = ~seen[1]
        made[1] = {"input_ids": made[1]["input_ids"][text][None], "pixel_values": None}
        seen[1] = torch.zeros_like(made[1]["input_ids"], dtype=torch.bool)
    blocks = blocks_of(zoo)

    where = zoo.decoder_prefix, zoo.attention_kinds
    with lazy_oracle(model, blocks, *where, mode, seen[0]) as oracle:
        steps = 5
        # The first forward of a turn feeds the last token of the turn before.
        both = torch.cat([seen[0], torch.zeros(1, steps, dtype=torch.bool), seen[1]], 1)
        oracle.see(both)
        expected, tokens = converse(model, made, DynamicCache(config=model.config), steps=steps)
    plan = Plan.lazy(blocks, mode)
    cache = AVLCache(plan, model.config) if kind == "compact" else DynamicCache(config=model.config)
    with through(door, model, compiler="eager", plan=plan):
        got, same = converse(model, made, cache, steps=steps)
    if kind == "compact":
        fewer = [layer.values.shape[2] - layer.keys.shape[2] for layer in cache.layers]
        assert fewer == [int(both.sum()) if plan.lazy_policy.is_lazy(n) else 0 for n in range(len(fewer))]
    assert [t.tolist() for t in tokens] == [t.tolist() for t in same]
    assert largest(got, expected) <= FLOAT32_TOLERANCE


# ---- what is not known -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", rest_in_matrix(MODES, MODES[1:]))
@torch.no_grad()
def test_unknown_positions_are_dense_with_a_reason(mode):
    """Embeddings that somebody else made do not show what is visual; who knows may tell."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    visual = zoo.visual_positions(model, inputs)
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    plan = Plan.lazy([(0, zoo.decoder_layers - 1)], mode)
    dense = model(**embeds).logits
    with lazy_oracle(model, plan.lazy_policy.blocks, zoo.decoder_prefix, zoo.attention_kinds, mode, visual):
        lazy = model(**embeds).logits
    real = inputs["attention_mask"].bool()
    with through("torch.compile", model, compiler="eager", plan=plan) as recorder:
        got = model(**embeds).logits
    assert largest([got[real]], [dense[real]]) <= FLOAT32_TOLERANCE
    reasons = {s.layer: s.reason for s in decoder_sites(decoder_graphs(recorder)[0]) if s.reason}
    assert reasons == dict.fromkeys(plan.lazy_policy.lazy_layers, Reason.VISUAL_UNKNOWN)
    with avl_fx.modality_ids(visual), through("torch.compile", model, compiler="eager", plan=plan):
        got = model(**embeds).logits
    assert largest([got[real]], [lazy[real]]) <= FLOAT32_TOLERANCE
    assert largest([lazy[real]], [dense[real]]) > 100 * FLOAT32_TOLERANCE


@pytest.mark.matrix
@pytest.mark.parametrize("mode", MODES)
def test_a_model_without_visual_keys_is_dense(mode):
    """Mllama's images come in by cross-attention."""
    zoo = ZOO["mllama"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    dense = prefill_and_decode(model, inputs, "dynamic", steps=3)
    with through("torch.compile", model, compiler="eager", plan=Plan.lazy([(2, 3)], mode)) as recorder:
        got = prefill_and_decode(model, inputs, "dynamic", steps=3, tokens=dense.tokens)
    assert largest(got, dense) <= FLOAT32_TOLERANCE
    prompt = {s.layer: s.reason for s in decoder_sites(decoder_graphs(recorder)[0]) if s.reason}
    assert prompt == {3: Reason.VISUAL_UNKNOWN}


@pytest.mark.parametrize("mode", rest_in_matrix(MODES, MODES[:1]))
def test_a_prompt_without_images_is_dense(mode):
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2, first=3)
    text = {"input_ids": torch.randint(10, 90, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    plan = Plan.lazy(blocks_of(zoo), mode)
    dense = [prefill_and_decode(model, x, "dynamic", steps=3) for x in (text, inputs)]
    pairs = list(zip((text, inputs), dense, strict=True))
    with through("avl_fx.compile", model, compiler="eager", plan=plan):
        got = [prefill_and_decode(model, x, "dynamic", steps=3, tokens=d.tokens) for x, d in pairs]
    assert largest(got[0], dense[0]) <= FLOAT32_TOLERANCE
    assert largest(got[1], dense[1]) > 100 * FLOAT32_TOLERANCE  # the same graph, told that there are images


@pytest.mark.parametrize("mode", rest_in_matrix(MODES, MODES[:1]))
def test_sliding_layers_stay_dense(mode):
    zoo = ZOO["gemma3"]
    sliding = [i for i, kind in enumerate(zoo.attention_kinds) if kind == "sliding"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    plan = Plan.lazy([(sliding[0], sliding[1])], mode)
    dense = prefill_and_decode(model, inputs, "dynamic", steps=3)
    with through("torch.compile", model, compiler="eager", plan=plan) as recorder:
        got = prefill_and_decode(model, inputs, "dynamic", steps=3, tokens=dense.tokens)
    assert largest(got, dense) <= FLOAT32_TOLERANCE
    refused = {s.layer: s.reason for g in decoder_graphs(recorder) for s in decoder_sites(g) if s.reason}
    assert refused == {sliding[1]: Reason.POSITION_MASK}
