"""Models that attend in a kernel of another library (a stand-in for FlashAttention, flex_attention).

`avl_fx.compile` lets them attend by SDPA as long as they are compiled; `torch.compile` cannot, and says so.
"""

import copy
import itertools
import logging

import pytest
import torch

import avl_fx
from avl_fx import Plan, _compat
from avl_fx.attention_kernels import opaque_kernels, warn_of_hidden_attention
from tests._flash_attention import as_in_transformers, flash_attn_func
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_sites, largest, through, whole
from tests.zoo import ZOO, plain_lvlm
from tests.zoo._run import prefill_and_decode

KERNEL = as_in_transformers()
PLANS = {
    "identity": None,
    "lazy": Plan.lazy([(1, 3)]),
    "avl": Plan.avl(core=0.3, secondary=0.5, refresh=3, text=None),
}


def attending_in(kernel, name="llava"):
    model = ZOO[name].make()
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        _compat.set_attention_implementation(config, kernel)
    return model


def implementations(model):
    return {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="avl_fx")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "avl_fx"]


@pytest.mark.parametrize(
    ("name", "batch"),
    rest_in_matrix(list(itertools.product(("llava", "internvl"), (1, 3))), [("llava", 3), ("internvl", 1)], True),
)
def test_the_identity_plan_is_what_the_kernel_computes(name, batch):
    zoo = ZOO[name]
    model = attending_in(KERNEL, name)
    inputs = zoo.inputs(model, batch)
    expected = prefill_and_decode(model, inputs)
    with through("avl_fx.compile", model, compiler="eager") as recorder:
        got = prefill_and_decode(model, inputs, tokens=expected.tokens)
    assert largest(got, expected) < FLOAT32_TOLERANCE
    assert whole(zoo, recorder)
    assert implementations(model) == {KERNEL}


@pytest.mark.parametrize(
    ("name", "plan"),
    rest_in_matrix([("llava", "lazy"), ("gemma3", "lazy"), ("qwen2_5_vl", "avl")], [("llava", "lazy")], True),
)
def test_a_plan_does_what_it_does_to_sdpa(name, plan):
    zoo = ZOO[name]
    runs = []
    for model in (zoo.make(), attending_in(KERNEL, name)):
        with through("avl_fx.compile", model, compiler="eager", plan=PLANS[plan]):
            assert implementations(model) == {"sdpa"}
            runs.append(prefill_and_decode(model, zoo.inputs(model, 2)))
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert largest(*runs) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("plan", rest_in_matrix(list(PLANS), ["avl"]))
def test_a_model_of_your_own_that_calls_flash_attention(plan, monkeypatch):
    """Its operator is in the graph, as a site like any other."""

    def attend(layer, q, k, v, mask):
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)

    zoo = ZOO["plain_lvlm"]
    inputs = zoo.inputs(zoo.make(), 1)  # nothing is padded
    runs = []
    for calls in (None, attend):
        if calls is not None:
            monkeypatch.setattr(plain_lvlm.DecoderLayer, "attend", calls)
        model = zoo.make()
        with through("torch.compile", model, compiler="eager", plan=PLANS[plan]) as recorder:
            runs.append(prefill_and_decode(model, inputs, forward=model.forward))
    assert largest(*runs) < FLOAT32_TOLERANCE
    styles = {(s.style, s.reason) for g in recorder.graphs for s in decoder_sites(g)}
    assert styles == {("library", None)}


def test_what_was_asked_for_comes_back():
    model = attending_in(KERNEL)
    avl_fx.compile(model)
    assert implementations(model) == {"sdpa"}
    avl_fx.compile(model, Plan.lazy([(1, 3)]))
    copied = copy.deepcopy(model)
    avl_fx.uncompile(model)
    assert implementations(model) == {KERNEL}
    assert implementations(copied) == {"sdpa"}
    avl_fx.compile(model)
    model.set_attn_implementation("eager")  # whoever asks for something else gets it
    avl_fx.uncompile(model)
    assert implementations(model) == {"eager"}


@pytest.mark.matrix
def test_whoever_borrows_a_model_gives_it_back():
    model = attending_in(KERNEL)
    inputs = ZOO["llava"].inputs(model, 1)
    avl_fx.calibrate(model, [inputs], lazy_share=0.25, progress=False)
    assert implementations(model) == {KERNEL}
    avl_fx.compile(model)
    avl_fx.explain(model, front_door="avl_fx.compile", new_tokens=1, **inputs)
    assert implementations(model) == {"sdpa"}
    avl_fx.uncompile(model)
    assert implementations(model) == {KERNEL}


def test_explain_says_it():
    model = attending_in(KERNEL)
    inputs = ZOO["llava"].inputs(model, 1)
    report = avl_fx.explain(model, front_door="avl_fx.compile", new_tokens=1, **inputs)
    assert implementations(model) == {KERNEL}
    assert report.kernels == {KERNEL: "sdpa"}
    assert f"sdpa instead of {KERNEL}, which no graph shows" in str(report)
    assert not [line for line in report.advice if KERNEL in line]
    report = avl_fx.explain(model, front_door="torch.compile", new_tokens=1, **inputs)
    assert report.kernels == {KERNEL: KERNEL}
    assert report.advice[0].startswith(f"The model attends in {KERNEL}, where no pass sees it: load it with")


def test_it_is_announced_once(said):
    model = attending_in(KERNEL)
    for _ in range(2):
        avl_fx.compile(model)
    avl_fx.uncompile(model)
    (line,) = said()
    assert line.startswith(f"Attention runs in sdpa instead of {KERNEL}")


def test_torch_compile_announces_that_a_plan_does_nothing(said):
    model = attending_in(KERNEL)
    inputs = ZOO["llava"].inputs(model, 1)
    with through("torch.compile", model, compiler="eager"):
        prefill_and_decode(model, inputs, steps=1)
    assert not said()
    warn_of_hidden_attention.cache_clear()
    with through("torch.compile", model, compiler="eager", plan=Plan.lazy([(1, 3)])):
        prefill_and_decode(model, inputs, steps=1)
    (line,) = [line for line in said() if KERNEL in line]
    assert f"runs in {KERNEL}, breaks graphs and is seen by no pass: Plan(lazy: gla 1..3) does nothing to it" in line


def test_a_model_that_cannot_change_it_is_left_alone(monkeypatch, said):
    """Remote code that chooses a class of attention when it is built."""
    model = attending_in(KERNEL)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    for part in (model.model, model.model.language_model, model.model.vision_tower):
        monkeypatch.setattr(type(part), "_can_set_attn_implementation", classmethod(lambda cls: False))
    avl_fx.compile(model)
    assert KERNEL in implementations(model)
    assert not said()
    avl_fx.uncompile(model)
    report = avl_fx.explain(model, front_door="avl_fx.compile", **ZOO["llava"].inputs(model, 1))
    assert report.kernels == {KERNEL: KERNEL}
    assert "and cannot change that: load it with attn_implementation='sdpa'" in report.advice[0]


@pytest.mark.parametrize(
    ("name", "opaque"),
    [
        ("flash_attention_2", True),
        ("flash_attention_3", True),
        ("flex_attention", True),
        ("kernels-community/flash-attn2", True),
        ("sdpa", False),
        ("eager", False),
        ("my_own", False),
    ],
)
def test_which_kernels_no_graph_shows(name, opaque):
    assert opaque_kernels(attending_in(name)) == ((name,) if opaque else ())


def test_soft_capped_logits_are_not_given_to_sdpa():
    """It does not know them, and some releases drop them without a word."""
    model = attending_in(KERNEL, "gemma3")
    text = model.config.text_config
    text.attn_logit_softcapping = 5.0
    avl_fx.compile(model)
    assert text._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
    avl_fx.uncompile(model)
    assert implementations(model) == {KERNEL}
