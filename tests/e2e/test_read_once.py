"""Decode steps that read each key once, behind a model: exact, and blind to what a static cache does not hold yet.

The caches of tests are so short that ATen is faster, so the limit is taken away here.
"""

import pytest
import torch
from transformers import StaticCache

from avl_fx import Plan
from tests._compiler import needs_compiler
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.e2e.test_identity import check
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

pytestmark = [needs_compiler, pytest.mark.usefixtures("short_caches_too")]


def taken(recorder):
    """Sites that the stage took, of each decoder graph of one query."""
    decode = [g for g in decoder_graphs(recorder) if decoder_sites(g)[0].queries == 1]
    return [sum(p.count for p in g.passes if p.name == "read_once") for g in decode]


STATIC = [
    ("llava", "torch.compile", "sdpa", "float32", "eager"),
    ("llava", "avl_fx.compile", "eager", "bfloat16", "eager"),
    ("llava", "torch.compile", "sdpa", "bfloat16", "inductor"),
    ("qwen2_5_vl", "avl_fx.compile", "sdpa", "float32", "eager"),
    ("gemma3", "torch.compile", "eager", "float32", "eager"),
    ("mistral3", "avl_fx.compile", "sdpa", "float32", "aot_eager"),
    ("plain_lvlm", "torch.compile", "sdpa", "float32", "eager"),
    ("plain_lvlm", "avl_fx.compile", "eager", "bfloat16", "eager"),
]


@pytest.mark.parametrize("case", rest_in_matrix(STATIC, STATIC[3:4]), ids="-".join)
def test_a_static_cache(case):
    name, door, style, dtype, compiler = case
    recorder = check(name, door, style, "static", dtype, compiler)
    assert set(taken(recorder)) == {ZOO[name].decoder_layers}


@pytest.mark.parametrize("name", rest_in_matrix(["gemma3", "mllama"], ["mllama"]))
def test_what_does_not_grow_in_place(name):
    """Sliding windows, and layers that attend to the images."""
    recorder = check(name, "avl_fx.compile", "sdpa", "dynamic", "float32", "eager")
    others = sum(kind != "full" for kind in ZOO[name].attention_kinds)
    assert others
    assert taken(recorder)[-1] == others


LAZY, WINDOW = Plan.lazy([(0, 1), (2, 3)]), Plan.avl(0.3, 0.5, 2, text=0.3, text_minimum=2)


@pytest.mark.parametrize(
    ("cache", "plan"),
    [
        pytest.param("dynamic", LAZY, id="dynamic-lazy", marks=pytest.mark.matrix),
        pytest.param("static", WINDOW, id="static-text window"),
        pytest.param("static", LAZY, id="static-lazy", marks=pytest.mark.matrix),
        pytest.param("dynamic", WINDOW, id="dynamic-text window", marks=pytest.mark.matrix),
    ],
)
def test_plans_mean_what_they_meant(cache, plan, monkeypatch):
    zoo = ZOO["gemma3" if plan.lazy_policy is None else "llava"]
    model = zoo.make("sdpa")
    inputs = zoo.inputs(model, batch=2)
    with through("torch.compile", model, compiler="eager", plan=plan) as recorder:
        mine = prefill_and_decode(model, inputs, cache, steps=6)
    assert any(taken(recorder)) == (cache == "static" or plan.lazy_policy is None)
    monkeypatch.setattr("avl_fx.passes.read_once.is_available", lambda: False)
    with through("torch.compile", model, compiler="eager", plan=plan) as recorder:
        aten = prefill_and_decode(model, inputs, cache, steps=6, tokens=mine.tokens)
    assert not any(taken(recorder))
    assert largest(mine, aten) <= FLOAT32_TOLERANCE


def test_empty_rows_of_a_static_cache_may_be_anything():
    zoo = ZOO["llava"]
    model = zoo.make("sdpa")
    inputs = zoo.inputs(model, batch=2)
    prompt = inputs["input_ids"].shape[1]
    assert not inputs["attention_mask"].all(), "padding as well"

    def steps(forward, poisoned):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=prompt + 40)
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
            for layer in cache.layers if poisoned else ():
                for buffer in (layer.keys, layer.values):
                    buffer[:, :, prompt:] = torch.nan
                    buffer.transpose(1, 2)[:, :prompt][inputs["attention_mask"] == 0] = torch.nan
            for number in range(5):
                mask = torch.cat([inputs["attention_mask"], torch.ones(2, number + 1, dtype=torch.long)], 1)
                token = torch.full((2, 1), 20 + number)
                yield forward(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits

    expected = list(steps(model.forward, poisoned=False))
    prompted = model.forward
    with through("torch.compile", model, compiler="eager") as recorder:
        compiled, model.forward = model.forward, prompted
        answers = list(steps(compiled, poisoned=True))
    assert largest(answers, expected) <= FLOAT32_TOLERANCE
    assert set(taken(recorder)) == {zoo.decoder_layers}


@pytest.mark.matrix
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_give_the_same_tokens(cache):
    """They reorder their cache at each step: a dynamic one is copied, and the copy read once."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    settings = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "num_beams": 3}
    settings |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    expected = model.generate(**inputs, **settings)
    with through("torch.compile", model, compiler="eager") as recorder:
        assert torch.equal(model.generate(**inputs, **settings), expected)
    assert all(taken(recorder))
