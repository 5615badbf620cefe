"""Masks that weigh keys by their place (ALiBi): rows that move would be weighed for places where they are not."""

import pytest
import torch
import torch.nn.functional as F

import avl_fx
from avl_fx import Plan
from avl_fx.passes.site import Reason
from avl_fx.record import Undivided
from tests.e2e._doors import FLOAT32_TOLERANCE, largest, through
from tests.oracle import avl_oracle
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode
from tests.zoo.plain_lvlm import HEADS, KV_HEADS, DecoderLayer, PlainLVLM, make

ZOO_MODEL = ZOO["plain_lvlm"]


class BiasedLayer(DecoderLayer):
    """Every head looks at what is near, each at its own rate."""

    def attend(self, q, k, v, mask):
        slopes = 0.5 ** torch.arange(1, HEADS + 1)
        bias = slopes[:, None, None] * torch.arange(mask.shape[-1])  # up to a constant of the row, as ALiBi has it
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        bias = bias.masked_fill(~mask, torch.finfo(torch.float32).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Biased(PlainLVLM):
    def __init__(self, style):
        super().__init__(style)
        self.layers = torch.nn.ModuleList(BiasedLayer(style) for _ in self.layers)


VISION = {"text": None}
TEXT = {"core": 1.0, "secondary": 1.0, "refresh": 1, "text": 0.5, "text_minimum": 2}


@pytest.mark.parametrize(
    ("settings", "cache"),
    [
        pytest.param(VISION, "dynamic", id="vision-dynamic"),
        pytest.param(VISION, "static", id="vision-static", marks=pytest.mark.matrix),
        pytest.param(TEXT, "dynamic", id="text-dynamic", marks=pytest.mark.matrix),
        pytest.param(TEXT, "static", id="text-static", marks=pytest.mark.matrix),
    ],
)
def test_a_position_bias_keeps_attention_dense(cache, settings, caplog):
    model = make(construct=Biased)
    inputs = ZOO_MODEL.inputs(model, batch=2)
    expected = prefill_and_decode(model, inputs, cache, steps=8)
    plan = Plan.avl(**settings)
    with through("torch.compile", model, compiler="eager", plan=plan):
        found = prefill_and_decode(model, inputs, cache, steps=8, tokens=expected.tokens)
    assert largest(found, expected) <= FLOAT32_TOLERANCE
    assert f"{Undivided.BIASED}: the cache is not partitioned" in caplog.text
    report = avl_fx.explain(model, plan, compiler="eager", **inputs)
    assert Undivided.BIASED in str(report)


def test_the_same_model_without_a_bias_is_partitioned():
    """So that the test above cannot pass for another reason."""
    model = ZOO_MODEL.make()
    inputs = ZOO_MODEL.inputs(model, batch=2)
    visual = ZOO_MODEL.visual_positions(model, inputs)
    expected = prefill_and_decode(model, inputs, "dynamic", steps=8)
    settings = {"core": 0.3, "secondary": 0.5, "refresh": 3}
    with avl_oracle(model, visual, decoder_prefix="layers", text=1.0, **settings):
        oracle = prefill_and_decode(model, inputs, "dynamic", steps=8, tokens=expected.tokens)
    with through("torch.compile", model, compiler="eager", plan=Plan.avl(text=None, **settings)):
        found = prefill_and_decode(model, inputs, "dynamic", steps=8, tokens=expected.tokens)
    assert largest(found, oracle) <= FLOAT32_TOLERANCE
    assert largest(oracle, expected) > 10 * FLOAT32_TOLERANCE


class PickingLayer(DecoderLayer):
    """Beyond a number of keys it picks some by their place, as a layer with an indexer and a cache for it does."""

    budget = 0

    def shown(self, q, mask):
        places = torch.arange(mask.shape[-1])
        picked = (places % 5 != 2) & (places * q.abs().amax() >= 0)
        return mask & (picked | (places[-1] < self.budget))

    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, self.shown(q, mask))


class Picking(PlainLVLM):
    def __init__(self, style):
        super().__init__(style)
        self.layers = torch.nn.ModuleList([PickingLayer(style), *self.layers[1:]])


def test_a_layer_that_picks_keys_by_their_place_stays_dense():
    """The first one, whose mask is held against no other; a prompt within the budget does not show what comes."""
    model = make(construct=Picking)
    inputs = ZOO_MODEL.inputs(model, batch=1)
    model.layers[0].budget = inputs["input_ids"].shape[1] + 2
    visual = ZOO_MODEL.visual_positions(model, inputs)
    dense = prefill_and_decode(model, inputs, "dynamic", steps=8)
    settings = {"core": 0.3, "secondary": 0.5, "refresh": 3}
    plain = make(construct=Picking)
    plain.layers[0].budget = 10**6
    assert largest(prefill_and_decode(plain, inputs, "dynamic", steps=8, tokens=dense.tokens), dense) > 0.1
    with through("torch.compile", model, compiler="eager", plan=Plan.avl(text=None, **settings)) as recorder:
        found = prefill_and_decode(model, inputs, "dynamic", steps=8, tokens=dense.tokens)
    sites = [site for graph in recorder.graphs for site in graph.sites if site.layer == 0 and site.role == "decoder"]
    assert {(s.reason, s.detail) for s in sites} == {(Reason.POSITION_MASK, "it is computed from hidden states")}
    with avl_oracle(model, visual, decoder_prefix="layers", text=1.0, kinds=["dense", *["full"] * 3], **settings):
        first = model.layers[0]
        theirs = first.attend
        first.attend = lambda q, k, v, mask: theirs(q, k, v, first.shown(q, mask))
        expected = prefill_and_decode(model, inputs, "dynamic", steps=8, tokens=dense.tokens)
    assert largest(found, expected) <= FLOAT32_TOLERANCE
    assert largest(expected, dense) > 10 * FLOAT32_TOLERANCE
