"""Static caches that are written to again from an earlier position: tokens taken back, or another prompt."""

import pytest
import torch

from avl_fx import Plan
from avl_fx.errors import CacheStateError
from tests.e2e._doors import FLOAT32_TOLERANCE, largest, through
from tests.oracle import avl_oracle
from tests.zoo import ZOO
from tests.zoo.plain_lvlm import HEAD_DIM, KV_HEADS, LAYERS

ZOO_MODEL = ZOO["plain_lvlm"]
SPARE = 12


def start(model):
    inputs = ZOO_MODEL.inputs(model, batch=1)
    length = inputs["input_ids"].shape[1]
    return inputs, length, [torch.zeros(1, KV_HEADS, length + SPARE, HEAD_DIM) for _ in range(2 * LAYERS)]


@torch.no_grad()
def feed(model, cache, tokens, at, pixel_values=None):
    """Logits of the last of ``tokens``, which are written to positions from ``at`` on."""
    end = at + tokens.shape[1]
    mask = (torch.arange(cache[0].shape[2]) < end).long()[None]
    out, _ = model(tokens, mask, pixel_values=pixel_values, cache=cache, slots=torch.arange(at, end))
    return out[:, -1]


def tokens(*numbers):
    return torch.tensor([numbers])


def converse(model, calls):
    """The prompt, then ``calls`` of (position from its end on, tokens)."""
    inputs, length, cache = start(model)
    logits = [feed(model, cache, inputs["input_ids"], 0, inputs["pixel_values"])]
    return logits + [feed(model, cache, new, length + at) for at, new in calls]


STRAIGHT = [(0, tokens(20)), (1, tokens(31)), (2, tokens(32)), (3, tokens(33))]
TAKEN_BACK = [(0, tokens(20)), (1, tokens(21)), (2, tokens(22)), *STRAIGHT[1:]]


def test_steps_behind_the_images_can_be_taken_back():
    """No row of theirs has moved. Every step reads secondary, so that it does not matter how many there were."""
    model = ZOO_MODEL.make()
    visual = ZOO_MODEL.visual_positions(model, ZOO_MODEL.inputs(model, batch=1))
    dense = converse(model, STRAIGHT)
    with avl_oracle(model, visual, core=0.3, secondary=0.5, refresh=0, text=1.0, decoder_prefix="layers"):
        expected = converse(model, STRAIGHT)
    with through("torch.compile", model, compiler="eager", plan=Plan.avl(0.3, 0.5, 0, text=None)):
        found = converse(model, TAKEN_BACK)
    assert largest(found[-3:], expected[-3:]) <= FLOAT32_TOLERANCE
    assert largest(expected[-3:], dense[-3:]) > 10 * FLOAT32_TOLERANCE


def test_tokens_that_are_checked_several_at_once_can_be_taken_back():
    """As speculative decoding does. Each such call is a turn of its own: dense, on rows that have moved."""
    model = ZOO_MODEL.make()
    calls = [(0, tokens(21, 22, 23)), (0, tokens(31, 32)), (1, tokens(33, 34))]
    expected = converse(model, calls)
    with through("torch.compile", model, compiler="eager", plan=Plan.avl(0.3, 0.5, 0, text=None)):
        found = converse(model, calls)
    assert largest(found, expected) <= FLOAT32_TOLERANCE


def test_under_a_text_window_they_cannot():
    """Rows of other tokens lie where theirs were."""
    model = ZOO_MODEL.make()
    plan = Plan.avl(1.0, 1.0, 1, text=0.5, text_minimum=2)
    with (
        through("torch.compile", model, compiler="eager", plan=plan),
        pytest.raises(CacheStateError, match=r"written to from position .*Fix: start again"),
    ):
        converse(model, TAKEN_BACK)


def test_another_prompt_in_the_same_buffers():
    """Nothing of the first is left: neither rows nor where they lie."""
    model = ZOO_MODEL.make()
    visual = ZOO_MODEL.visual_positions(model, ZOO_MODEL.inputs(model, batch=1))
    steps = [tokens(20), tokens(21), tokens(22)]

    def twice(times):
        inputs, length, cache = start(model)
        logits = []
        for _ in range(times):
            logits = [feed(model, cache, inputs["input_ids"], 0, inputs["pixel_values"])]
            logits += [feed(model, cache, new, length + at) for at, new in enumerate(steps)]
        return logits

    settings = {"core": 0.3, "secondary": 0.5, "refresh": 2}
    with avl_oracle(model, visual, text=1.0, decoder_prefix="layers", **settings):
        expected = twice(1)
    with through("torch.compile", model, compiler="eager", plan=Plan.avl(text=None, **settings)):
        found = twice(2)
    assert largest(found, expected) <= FLOAT32_TOLERANCE
