"""Decoding does not recompile: after the second step, 64 steps run on what is there."""

import itertools

import pytest
import torch

import avl_fx
from avl_fx import Plan
from avl_fx._compat import isolation
from avl_fx.errors import CaptureError
from avl_fx.record import recording
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import decoder_graphs, decoder_sites, through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS = 64
LAZY = Plan.lazy([(0, 1), (2, 3)])


@pytest.mark.parametrize(
    ("name", "cache", "plan"),
    rest_in_matrix(
        [*itertools.product(("llava", "qwen2_5_vl"), ("dynamic", "static"), (None, LAZY))],
        [("llava", "static", LAZY)],
        apart=True,
    ),
)
def test_no_recompile_after_the_second_decode_step(name, cache, plan):
    check(name, cache, plan)


@pytest.mark.parametrize(
    ("name", "cache"), [pytest.param("llava", "static", marks=pytest.mark.matrix), ("gemma3", "dynamic")]
)
def test_no_recompile_where_keys_are_read_once(name, cache, short_caches_too):
    recorder = check(name, cache, None)
    assert any(p.name == "read_once" and p.count for g in recorder.graphs for p in g.passes)


def check(name, cache, plan):
    zoo = ZOO[name]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    counts = []

    with through("torch.compile", model, compiler="eager", plan=plan) as recorder:
        prefill_and_decode(model, inputs, cache, steps=STEPS, forward=_counting(model.forward, recorder, counts))
    assert len(counts) == STEPS + 1
    assert counts[2] == counts[-1], f"graphs after each forward: {counts}"
    decode = [g for g in decoder_graphs(recorder) if decoder_sites(g)[0].queries == 1]
    assert len(decode) == (1 if cache == "static" else 2)
    return recorder


def _counting(forward, recorder, counts):
    def run(*args, **kwargs):
        out = forward(*args, **kwargs)
        counts.append(len(recorder.graphs))
        return out

    return run


def test_the_recompile_limit_is_an_error_that_says_what_to_do(monkeypatch):
    """Transformers records attention weights by hooks, at which Dynamo splits the decoder: a graph a layer, or more."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=1)

    def answer():
        out = model.generate(**inputs, max_new_tokens=4, output_attentions=True, return_dict_in_generate=True)
        return out.sequences

    monkeypatch.setattr("avl_fx.regions.RECOMPILE_LIMIT", 2)  # four layers need not reach 16
    expected = answer()
    limited = torch._dynamo.config.patch(recompile_limit=2)
    with limited, through("avl_fx.compile", model, plan=Plan.avl(text=None), compiler="eager"):
        with pytest.raises(CaptureError, match=r"recompile_limit: .* compiled 2 times.* Fix: raise it") as caught:
            answer()
        assert "output_attentions" in caught.value.remedy
        avl_fx.uncompile(model)
        assert torch.equal(answer(), expected)


@pytest.mark.skipif(not isolation(), reason="this torch counts the graphs of all models of a class together")
def test_one_plan_after_the_other(monkeypatch):
    """Each is tried on batches of two sizes; what the one before it compiled is no reason to run it eagerly."""
    zoo = ZOO["llava"]
    model = zoo.make()
    monkeypatch.setattr("avl_fx.regions.RECOMPILE_LIMIT", 8)  # one plan needs five or six
    torch._dynamo.reset()
    try:
        for plan in (None, LAZY):
            with recording() as recorder:
                avl_fx.compile(model, plan, options={"compiler": "eager", "strict": True})
                for batch in (1, 2):
                    prefill_and_decode(model, zoo.inputs(model, batch), "dynamic", steps=2)
            sites = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph)]
            assert {site.queries == 1 for site in sites} == {False, True}, "prompts and steps are compiled"
            assert any(site.action.startswith(("lazy", "partitioned")) for site in sites) == (plan is not None)
    finally:
        avl_fx.uncompile(model)
        torch._dynamo.reset()


def test_batches_of_many_sizes_stay_below_the_limit():
    """Prompts alone, padded or not, then steps on a compact cache: more kinds of call than Dynamo's eight."""
    zoo = ZOO["llava"]
    model = zoo.make()
    plan = Plan.avl(0.3, 0.5, 3, text=0.5, text_minimum=4).combine(Plan.lazy([(1, 3)], mode="vla_scores"))
    counts = []
    with through("avl_fx.compile", model, plan=plan, compiler="eager") as recorder:
        for batch, seed, steps in [(1, 0, 4), (2, 1, 6), (3, 2, 3), (1, 3, 5), (4, 4, 6), (2, 5, 3), (5, 6, 4)]:
            given = zoo.inputs(model, batch=batch, seed=seed)
            prefill_and_decode(model, given, avl_fx.AVLCache(plan, model.config), steps=steps)
            counts.append(len(decoder_graphs(recorder)))
    assert counts[-1] == counts[2], f"decoder graphs after each: {counts}"
