"""L1: modality-partitioned attention equals the independent eager oracle, over decode steps that cross refreshes.

Every model of the zoo that has visual positions among its keys (all but Mllama), both front doors, both stock caches
and ours, batch 1 and a ragged padded batch of 3, with and without lazy blocks on top.
"""

import contextlib
import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

import avl_fx
import avl_fx.partition
from avl_fx import AVLCache, Plan
from avl_fx.passes.site import Reason, Status
from tests.e2e._covering import covering, one_each, rest_in_matrix
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.e2e.test_identity import FRAGMENTED
from tests.oracle import avl_oracle
from tests.zoo import ZOO
from tests.zoo._run import on, prefill_and_decode
from tests.zoo.plain_lvlm import PlainLVLM, make

STEPS = 24
PRESETS = {
    "paper": {"core": 0.3, "secondary": 0.5, "refresh": 3},
    "tight": {"core": 0.1, "secondary": 0.2, "refresh": 2, "scores": "per_kv_head"},
    "window": {"core": 0.25, "secondary": 1.0, "refresh": 5, "scoring_window": 4},
    "secondary": {"core": 0.3, "secondary": 0.5, "refresh": 0},
    "text": {"core": 0.3, "secondary": 0.5, "refresh": 3, "text": 0.5, "text_minimum": 4},
    "heavy": {"core": 1.0, "secondary": 1.0, "refresh": 1, "text": 0.4, "text_minimum": 2, "decay": "none"},
    "spread": {"core": 0.3, "secondary": 0.5, "refresh": 3, "spread": 0.5},
    "spread_heads": {"core": 0.2, "secondary": 0.4, "refresh": 2, "spread": 0.7, "scores": "per_kv_head"},
}


def as_oracle(settings):
    """A preset in the oracle's words."""
    words = {"scoring_window": "window", "text_minimum": "minimum"}
    return {"text": 1.0, **{words.get(name, name): value for name, value in settings.items()}}


NAMES = [name for name, zoo in ZOO.items() if "full" in zoo.attention_kinds and name != "mllama"]
CACHES = ("dynamic", "static", "compact")
FACTORS = (NAMES, DOORS, CACHES, (1, 3), tuple(PRESETS), ("dense", "lazy"))


def _allowed(case):
    # PlainLVLM keeps a list of tensors of its own: what a transformers cache stores is nothing to it.
    return case[:2] not in FRAGMENTED and (case[0] != "plain_lvlm" or case[2] != "compact")


CASES = list(filter(_allowed, itertools.product(*FACTORS)))
CHOSEN = one_each(CASES)
"""Each model once, the other factors spread. `make test` runs every second one."""
TOGETHER = [next(case for case in CHOSEN if case[2] == cache and case[3] == 3) for cache in CACHES]
"""Of those: one ragged batch on each cache."""
COVERING = covering(FACTORS, _allowed)
"""`make test-matrix` runs these, in which any two of model, door, cache, batch, preset and laziness meet ..."""
SPREAD = itertools.cycle(itertools.product(DOORS, ("dense", "lazy")))
TRIPLES = itertools.product(NAMES, CACHES, (1, 3), ("paper", "text", "heavy"))
SPREAD_CASES = (
    (name, door if (name, door) not in FRAGMENTED else DOORS[0], cache, batch, preset, layers)
    for (name, cache, batch, preset), (door, layers) in zip(TRIPLES, SPREAD, strict=False)
)
PRODUCT = list(filter(_allowed, SPREAD_CASES))
"""... and these: every model with every cache, batch and published preset, the other two factors spread."""
COMPILED = [
    ("llava", "torch.compile", "dynamic", 3, "paper", "dense"),
    ("llava", "avl_fx.compile", "compact", 3, "text", "dense"),
]


def ids(case):
    return "-".join(map(str, case))


def blocks_of(zoo):
    """The first layer anchors nothing; the rest is one block, or what of it is of one kind."""
    first = next(i for i, kind in enumerate(zoo.attention_kinds) if i > 0 and kind == "full")
    return [(first, zoo.decoder_layers - 1)]


def check(name, door, cache, batch, preset, layers, compiler, device="cpu"):
    zoo = ZOO[name]
    settings = PRESETS[preset]
    model = zoo.make().to(device)
    inputs = on(device, zoo.inputs(model, batch=batch))
    visual = zoo.visual_positions(model, inputs)
    blocks = blocks_of(zoo) if layers == "lazy" else []
    plan = Plan.avl(**{"text": None, **settings})
    if blocks:
        plan = plan.combine(Plan.lazy(blocks))
    stock, cache = ("dynamic", AVLCache(plan, model.config)) if cache == "compact" else (cache, cache)
    dense = prefill_and_decode(model, inputs, stock, steps=STEPS)
    with avl_oracle(
        model,
        visual,
        blocks=blocks,
        decoder_prefix=zoo.decoder_prefix,
        kinds=zoo.attention_kinds,
        **as_oracle(settings),
    ):
        expected = prefill_and_decode(model, inputs, stock, steps=STEPS, tokens=dense.tokens)
    # PlainLVLM splices by index: no mask shows in any graph, so the user has to tell.
    told = avl_fx.modality_ids(visual) if name == "plain_lvlm" else contextlib.nullcontext()
    with told, through(door, model, compiler=compiler, plan=plan) as recorder:
        got = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=dense.tokens)

    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert largest(got, dense) > 10 * FLOAT32_TOLERANCE, "a plan that changes nothing proves nothing"
    for graph in decoder_graphs(recorder):
        for site in decoder_sites(graph):
            if zoo.attention_kinds[site.layer] == "full":
                assert "partitioned" in site.action, site
            else:
                assert (site.status, site.reason) == (Status.REFUSED, Reason.POSITION_MASK)


@pytest.mark.parametrize("case", rest_in_matrix(CHOSEN, CHOSEN[::2]), ids=ids)
def test_partitioned_equals_oracle(case):
    check(*case, compiler="eager")


@pytest.mark.parametrize("case", rest_in_matrix(CHOSEN, TOGETHER[-1:]), ids=ids)
def test_layers_that_choose_and_move_at_once_equal_oracle(case, monkeypatch):
    """As they do where they are not on a CPU."""
    monkeypatch.setattr(avl_fx.partition, "one_by_one", lambda device: False)
    check(*case, compiler="eager")


@pytest.mark.matrix
@pytest.mark.parametrize("case", sorted({*COVERING, *PRODUCT} - {*CHOSEN}), ids=ids)
def test_partitioned_equals_oracle_everywhere(case):
    check(*case, compiler="eager")


@pytest.mark.parametrize("case", rest_in_matrix(COMPILED, COMPILED[:1]), ids=ids)
def test_partitioned_equals_oracle_through_inductor(case):
    check(*case, compiler="inductor")


# ---- conversations, beams and masks ----------------------------------------------------------------------------------


@torch.no_grad()
def converse(model, turns, cache, steps=5):
    """Prompts on one cache, `steps` greedy steps after each; logits of every forward's last position, and the tokens.

    The first forward of a turn feeds the last token of the turn before.
    """
    logits, tokens = [], []
    for inputs in turns:
        ids, images = inputs["input_ids"], inputs["pixel_values"]
        if tokens:
            ids = torch.cat([tokens[-1], ids], 1)
        for _ in range(steps):
            out = model(input_ids=ids, pixel_values=images, past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1].float())
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            ids, images = tokens[-1], None
    return logits, torch.cat(tokens, 1)


@pytest.mark.parametrize(
    ("kind", "text", "spread"),
    rest_in_matrix([("dynamic", None, 0.0), ("static", 0.3, 0.5), ("dynamic", 0.3, 0.0)], [("static", 0.3, 0.5)], True),
    ids=["dynamic-all text", "static-text window-spread", "dynamic-text window"],
)
def test_images_in_a_second_turn(kind, text, spread):
    zoo = ZOO["llava"]
    model = zoo.make()
    turns = [zoo.inputs(model, batch=1, seed=seed) for seed in (0, 1)]
    seen = [zoo.visual_positions(model, inputs) for inputs in turns]
    # Turn two follows four fed tokens and starts with the fifth.
    both = torch.cat([seen[0], torch.zeros(1, 5, dtype=torch.bool), seen[1]], 1)

    def cache():
        if kind == "dynamic":
            return DynamicCache(config=model.config.get_text_config())
        return StaticCache(config=model.config.get_text_config(), max_cache_len=both.shape[1] + 8)

    shares = {"core": 0.3, "secondary": 0.5, "refresh": 2, "spread": spread}
    with avl_oracle(model, seen[0], **shares, text=text or 1.0, minimum=3) as oracle:
        first = converse(model, turns[:1], cache())
        oracle.layers.clear()
        # The oracle has to be told before turn two begins: a longer mask changes nothing about turn one.
        oracle.see(both)
        expected, tokens = converse(model, turns, cache())
    assert largest(first[0], expected[:5]) <= FLOAT32_TOLERANCE
    plan = Plan.avl(**shares, text=text, text_minimum=3)
    for door in DOORS:
        with through(door, model, compiler="eager", plan=plan):
            got, chosen = converse(model, turns, cache())
        assert torch.equal(chosen, tokens)
        assert largest(got, expected) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.matrix)])
def test_beam_search_runs_densely_after_its_first_reordering(cache):
    """Reordering the beams copies the cache; a copy has no state, and without state attention is dense and exact."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    options = {"num_beams": 2, "max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    # One key fewer than all of them: nearly dense, so that the beams stay comparable.
    expected = model.generate(**inputs, **options)
    with through("avl_fx.compile", model, compiler="eager", plan=Plan.avl(0.99, 1.0, 0, text=None)):
        assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize(
    ("kind", "told"),
    rest_in_matrix([("dynamic", False), ("dynamic", True), ("static", True)], [("dynamic", True)], apart=True),
    ids=["dynamic", "dynamic-told", "static-told"],
)
def test_a_mask_that_hides_visual_keys_keeps_attention_dense(kind, told, caplog):
    """Rows may change places only where the order of visual keys does not matter.

    Where the positions are given for the whole run, every decode step could start late: neither may that.
    """
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=1)
    visual = zoo.visual_positions(model, inputs)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, visual[0].nonzero()[3]] = 0
    dense = prefill_and_decode(model, inputs, kind, steps=4)
    door = "torch.compile" if told else "avl_fx.compile"
    always = avl_fx.modality_ids(visual) if told else contextlib.nullcontext()
    with always, through(door, model, compiler="eager", plan=Plan.avl(text=None)):
        got = prefill_and_decode(model, inputs, kind, steps=4, tokens=dense.tokens)
    assert largest(got, dense) <= FLOAT32_TOLERANCE
    assert "hides visual keys" in caplog.text


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_partitioned_cache_has_lost_nothing(kind):
    """Rows have moved, and dense attention over them gives the dense answer."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=3)
    text, prompt = model.config.get_text_config(), inputs["input_ids"].shape[1]

    def cache():
        return DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=prompt + 4)

    @torch.no_grad()
    def dense_step(past):
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        token = torch.full((3, 1), 20)
        return model(input_ids=token, attention_mask=mask, past_key_values=past, use_cache=True).logits

    mine, plain = cache(), cache()
    with torch.no_grad():
        model(**inputs, past_key_values=plain, use_cache=True)
        with through("avl_fx.compile", model, compiler="eager", plan=Plan.avl(0.2, 0.4, text=0.3, text_minimum=2)):
            model(**inputs, past_key_values=mine, use_cache=True)
    keys = [(a.keys, b.keys) for a, b in zip(mine.layers, plain.layers, strict=True)]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in keys), "rows have moved"
    assert all(torch.allclose(a.sum(2), b.sum(2), atol=1e-3) for a, b in keys), "among themselves"
    assert (dense_step(mine) - dense_step(plain)).abs().max() <= FLOAT32_TOLERANCE


def test_a_full_static_buffer_has_its_rows_where_they_entered():
    """What is written next into a full buffer replaces tokens by their place: a ring, or an error as here."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=3)
    config, prompt = model.config.get_text_config(), inputs["input_ids"].shape[1]

    @torch.no_grad()
    def fill():
        cache = StaticCache(config=config, max_cache_len=prompt + 2)
        model(**inputs, past_key_values=cache, use_cache=True)
        for step in range(3):
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, step + 1, dtype=torch.long)], 1)
            beyond = pytest.raises((IndexError, RuntimeError)) if step == 2 else contextlib.nullcontext()
            if step == 2:
                before.append([layer.keys.clone() for layer in cache.layers])
            with beyond:
                model(input_ids=torch.full((3, 1), 20), attention_mask=mask, past_key_values=cache, use_cache=True)
        return [layer.keys for layer in cache.layers]

    before = []
    expected = fill()
    with through("torch.compile", model, compiler="eager", plan=Plan.avl(0.2, 0.4, text=0.3, text_minimum=2)):
        found = fill()
    # The first layer's keys do not depend on what was read.
    assert not torch.allclose(before[1][0], expected[0], atol=1e-3), "rows had moved"
    assert torch.allclose(found[0], expected[0], atol=1e-3)
    assert all(torch.equal(a.sort(2).values, b.sort(2).values) for a, b in zip(found, before[1], strict=True))


class Recurrent(PlainLVLM):
    """Two layers that run twice each: four calls, four caches, two numbers."""

    def __init__(self, style):
        super().__init__(style)
        self.base = torch.nn.ModuleList(list(self._modules.pop("layers"))[:2])

    @property
    def layers(self):
        return [*self.base, *self.base]


def test_calls_that_share_a_layer_are_dense():
    """Scores of one call say nothing of another's cache."""
    model = make(construct=Recurrent)
    inputs = ZOO["plain_lvlm"].inputs(model, batch=1)
    expected = prefill_and_decode(model, inputs, "dynamic", steps=6)
    with through("torch.compile", model, compiler="eager", plan=Plan.avl(0.1, 0.2, 0, text=None)) as recorder:
        found = prefill_and_decode(model, inputs, "dynamic", steps=6, tokens=expected.tokens)
    assert largest(found, expected) <= FLOAT32_TOLERANCE
    sites = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph)]
    assert {(site.reason, site.detail) for site in sites} == {(Reason.LAYER_UNKNOWN, "2 calls share its number")}


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=pytest.mark.matrix)])
def test_a_late_start(kind):
    """The prompt ran eagerly; the first compiled step is dense and starts the partition, visual keys and text."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=3)
    visual = zoo.visual_positions(model, inputs)
    text, prompt = model.config.get_text_config(), inputs["input_ids"].shape[1]
    settings = {"core": 0.3, "secondary": 0.5, "refresh": 3, "text": 0.4}

    @torch.no_grad()
    def run(enter):
        cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=prompt + 24)
        model(**inputs, past_key_values=cache, use_cache=True)
        logits = []
        with enter:
            for step in range(20):
                mask = torch.cat([inputs["attention_mask"], torch.ones(3, step + 1, dtype=torch.long)], 1)
                token = torch.full((3, 1), 10 + step)
                out = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
                logits.append(out.logits[:, -1])
        return logits

    @contextlib.contextmanager
    def compiled():
        plan = Plan.avl(**settings, text_minimum=2)
        with avl_fx.modality_ids(visual), through("torch.compile", model, compiler="eager", plan=plan):
            yield

    expected = run(avl_oracle(model, visual, minimum=2, **settings))
    assert largest(run(compiled()), expected) <= FLOAT32_TOLERANCE
    assert largest(run(contextlib.nullcontext()), expected) > 10 * FLOAT32_TOLERANCE
