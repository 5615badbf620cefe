"""What a plan that drops keys says when the capture may leave layers dense."""

import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from avl_fx import Plan
from avl_fx.backend import warn_of_pieces
from tests.e2e._doors import through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="avl_fx")
    warn_of_pieces.cache_clear()
    return lambda: [r.getMessage() for r in caplog.records if r.name == "avl_fx"]


def test_fragments_are_announced_under_a_lazy_plan_only(warnings):
    zoo = ZOO["qwen3_vl"]
    model = zoo.make()
    inputs = zoo.inputs(model)
    with through("torch.compile", model, compiler="eager"):
        prefill_and_decode(model, inputs, "dynamic", steps=0)
    assert not warnings()
    with through("torch.compile", model, compiler="eager", plan=Plan.lazy([(0, 3)])):
        prefill_and_decode(model, inputs, "dynamic", steps=0)
    (said,) = (message for message in warnings() if "1 of 12 decoder layers" in message)
    assert "Plan(lazy: gla 0..3)" in said


@pytest.mark.parametrize("how", ["stance", "mode"])
def test_a_plan_that_does_nothing_is_announced_once(warnings, how):
    """Dynamo gives up on code that it meets under a dispatch mode, also for the calls behind it."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model)
    eager = {"stance": lambda: torch.compiler.set_stance("force_eager"), "mode": lambda: FlopCounterMode(display=False)}
    with through("avl_fx.compile", model, compiler="eager", plan=Plan.lazy([(0, 3)])):
        with eager[how]():
            prefill_and_decode(model, inputs, "dynamic", steps=1)
        (said,) = warnings()
        assert said.startswith("model.language_model ran eagerly")
        prefill_and_decode(model, inputs, "dynamic", steps=1)
    assert len(warnings()) == 1


def test_a_decoder_whose_attention_no_graph_shows_is_announced_once(warnings):
    """As that of `generate_batch`, whose cache keeps its keys in pages behind a function that Dynamo may not see."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model)
    expected = prefill_and_decode(model, inputs, "dynamic", steps=1)
    for layer in zoo.layers(model):
        layer.self_attn.forward = torch.compiler.disable(layer.self_attn.forward)
    with through("avl_fx.compile", model, compiler="eager"):
        prefill_and_decode(model, inputs, "dynamic", steps=1)
    assert not warnings()
    with through("avl_fx.compile", model, compiler="eager", plan=Plan.avl(0.3, 0.5, 3)):
        got = prefill_and_decode(model, inputs, "dynamic", steps=1, tokens=expected.tokens)
    (said,) = warnings()
    assert said.startswith("model.language_model was captured in pieces that do not show how its layers attend")
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_the_last_recompile_is_announced(warnings):
    zoo = ZOO["plain_lvlm"]
    model = zoo.make()
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        through("torch.compile", model, compiler="eager", plan=Plan.lazy([(0, 3)])),
    ):
        prefill_and_decode(model, zoo.inputs(model), "dynamic", steps=1)
    assert any("recompile_limit" in message for message in warnings())
    # Inside the limit nothing is said.
