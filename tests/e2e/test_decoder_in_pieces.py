"""Decoders that Dynamo captures in pieces, one graph a layer: experts that are looped over (Step 3.7), linear layers
that it cannot trace (compressed-tensors). A layer's attention is one of the pieces.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from avl_fx import Plan
from tests import zoo
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.oracle import avl_oracle
from tests.zoo._run import prefill_and_decode

ZOO = zoo.get("llava")
STEPS = 4
SHARES = {"core": 0.3, "secondary": 0.5, "refresh": 3}


class Breaking(nn.Module):
    """What Dynamo splits a graph at."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.module(hidden)


@pytest.fixture(params=["mlp", "self_attn.q_proj", "self_attn.o_proj"])
def model(request):
    """The break is in a layer, or within its attention: then the attention is a frame of its own."""
    model = ZOO.make()
    for layer in ZOO.layers(model):
        layer.set_submodule(request.param, Breaking(layer.get_submodule(request.param)))
    return model


@pytest.mark.parametrize("plan", [None, Plan.avl(**SHARES, text=None)], ids=["identity", "A-VL"])
def test_there_is_room_for_all_layers(model, monkeypatch, plan):
    """One code object is all of its layers, and each of them has a prompt's graph and two of steps."""
    inputs = ZOO.inputs(model, batch=2)
    expected = dense = prefill_and_decode(model, inputs, "dynamic", steps=STEPS)
    if plan is not None:
        settings = {**SHARES, "text": 1.0, "kinds": list(ZOO.attention_kinds), "decoder_prefix": ZOO.decoder_prefix}
        with avl_oracle(model, ZOO.visual_positions(model, inputs), **settings):
            expected = prefill_and_decode(model, inputs, "dynamic", steps=STEPS, tokens=dense.tokens)
        assert largest(dense, expected) > 10 * FLOAT32_TOLERANCE
    monkeypatch.setattr("avl_fx.regions.RECOMPILE_LIMIT", 3)  # four layers need twelve, four of them for the prompt
    with torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=8):
        with through("avl_fx.compile", model, plan=plan, compiler="eager") as recorder:
            got = prefill_and_decode(model, inputs, "dynamic", steps=STEPS, tokens=dense.tokens)
        assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit) == (3, 8)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    sites = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph)]
    assert Counter(site.layer for site in sites) == dict.fromkeys(range(ZOO.decoder_layers), 3)
    assert {site.reason for site in sites} == {None}
