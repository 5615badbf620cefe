"""Decoder layers that attend to something else than tokens, too: to what the layers before have added (Inkling 2).

Such an attention has neither a cache nor a mask; plans are about the one between tokens, and leave this one alone.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import avl_fx
from avl_fx import Plan
from avl_fx.passes.site import Reason
from tests import zoo
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through, whole
from tests.oracle import avl_oracle, lazy_oracle
from tests.zoo._run import prefill_and_decode

ZOO = zoo.get("llava")
STEPS = 7
SHARES = {"core": 0.3, "secondary": 0.5, "refresh": 3}
SINKS = "attention_with_sinks"


class OverDepth(nn.Module):
    """A norm, and in front of it an attention of each token to three states of its own."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.norm = norm
        generator = torch.Generator().manual_seed(width)
        self.query = nn.Parameter(torch.randn(1, width, generator=generator))
        self.shift = nn.Parameter(torch.randn(3, width, generator=generator))

    def forward(self, hidden: Tensor) -> Tensor:
        states = hidden.unsqueeze(-2) + self.shift
        query = self.query.expand(*states.shape[:-2], -1, -1)
        return self.norm(F.scaled_dot_product_attention(query, states, states).squeeze(-2))


def sinks(module, query, key, value, attention_mask, scaling, **_):
    """What the models write that have them: eager, a column of logits behind the keys."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = query @ key.transpose(-1, -2) * scaling
    logits = logits if attention_mask is None else logits + attention_mask
    logits = torch.cat([logits, torch.ones_like(logits[..., :1])], dim=-1)
    out = torch.softmax(logits, dim=-1)[..., :-1] @ value
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture(params=[1, 2], ids=["one a layer", "two a layer"])
def model(request):
    model = ZOO.make()
    for layer in ZOO.layers(model):
        for name in ("input_layernorm", "post_attention_layernorm")[: request.param]:
            norm = getattr(layer, name)
            setattr(layer, name, OverDepth(norm, norm.weight.numel()).requires_grad_(False))
    return model


@pytest.fixture
def inputs(model):
    return ZOO.inputs(model, batch=3)


@pytest.mark.parametrize("door", DOORS)
def test_lazy_layers_are_those_between_tokens(model, inputs, door):
    dense = prefill_and_decode(model, inputs, "dynamic", STEPS)
    blocks = [(0, ZOO.decoder_layers - 1)]
    with lazy_oracle(model, blocks, ZOO.decoder_prefix, list(ZOO.attention_kinds), "gla", None):
        expected = prefill_and_decode(model, inputs, "dynamic", STEPS, tokens=dense.tokens)
    with through(door, model, plan=Plan.lazy(blocks), compiler="eager") as recorder:
        got = prefill_and_decode(model, inputs, "dynamic", STEPS, tokens=dense.tokens)
    assert largest(got, expected) <= FLOAT32_TOLERANCE < largest(dense, expected) / 10
    assert whole(ZOO, recorder)


@pytest.mark.parametrize("door", DOORS)
def test_what_is_partitioned_is_between_tokens(model, inputs, door):
    dense = prefill_and_decode(model, inputs, "dynamic", STEPS)
    settings = {**SHARES, "text": 1.0, "decoder_prefix": ZOO.decoder_prefix, "kinds": list(ZOO.attention_kinds)}
    with avl_oracle(model, ZOO.visual_positions(model, inputs), **settings):
        expected = prefill_and_decode(model, inputs, "dynamic", STEPS, tokens=dense.tokens)
    with through(door, model, plan=Plan.avl(**SHARES, text=None), compiler="eager") as recorder:
        got = prefill_and_decode(model, inputs, "dynamic", STEPS, tokens=dense.tokens)
    assert largest(got, expected) <= FLOAT32_TOLERANCE < largest(dense, expected) / 10
    assert whole(ZOO, recorder)


@pytest.fixture
def with_sinks(model):
    """The model attends between tokens in a way that is not recognised: nothing is left for a plan."""
    AttentionInterface.register(SINKS, sinks)
    AttentionMaskInterface.register(SINKS, eager_mask)
    model.set_attn_implementation({"text_config": SINKS})
    yield model
    AttentionInterface._global_mapping.pop(SINKS)
    AttentionMaskInterface._global_mapping.pop(SINKS)


@pytest.mark.parametrize(
    "plan", [Plan.lazy([(0, 3)]), Plan.lazy([(0, 3)], "vla"), Plan.avl(**SHARES, text=None)], ids=str
)
@pytest.mark.parametrize("cache", ["none", "dynamic"])
def test_it_does_not_stand_in_for_one_that_is_not_recognised(with_sinks, inputs, cache, plan):
    dense = prefill_and_decode(with_sinks, inputs, cache, STEPS)
    with through("avl_fx.compile", with_sinks, plan=plan, compiler="eager") as recorder:
        got = prefill_and_decode(with_sinks, inputs, cache, STEPS, tokens=dense.tokens)
    assert largest(got, dense) <= FLOAT32_TOLERANCE
    sites = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph)]
    assert {(site.layer, site.reason) for site in sites} == {(i, Reason.SINKS) for i in range(ZOO.decoder_layers)}


def test_explain_names_what_is_not_recognised(with_sinks, inputs):
    said = str(avl_fx.explain(with_sinks, Plan.lazy([(0, 3)]), compiler="eager", **inputs))
    assert "some attention weights are cut off" in said
