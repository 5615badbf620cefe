"""Models in half precision, on a processor without units for it: as exact as eager, or more so."""

import pytest
import torch

from avl_fx import Plan
from tests._compiler import needs_compiler
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import DOORS, decoder_graphs, through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

pytestmark = needs_compiler
STEPS = 4
CASES = [(dtype, door) for dtype in (torch.bfloat16, torch.float16) for door in DOORS]


@pytest.mark.parametrize(("dtype", "door"), rest_in_matrix(CASES, CASES[:1], apart=True))
def test_linear_layers_round_once(dtype, door, monkeypatch):
    """Prompt and steps, against the same weights in float32."""
    monkeypatch.setattr("avl_fx.kernels.narrow_linear.native.has_units", lambda dtype: False)
    zoo = ZOO["llava"]
    model = zoo.make().to(dtype)
    inputs = zoo.inputs(model, batch=2)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    eager = prefill_and_decode(model, inputs, "dynamic", steps=STEPS)
    with through(door, model, compiler="eager", plan=Plan.identity()) as recorder:
        got = prefill_and_decode(model, inputs, "dynamic", steps=STEPS, tokens=eager.tokens)
    taken = [p.count for g in decoder_graphs(recorder) for p in g.passes if p.name == "narrow_linears"]
    assert len(taken) >= 2
    assert all(count >= 7 * zoo.decoder_layers for count in taken), "in the prompt's graph too"
    inputs["pixel_values"] = inputs["pixel_values"].float()
    exact = prefill_and_decode(model.float(), inputs, "dynamic", steps=STEPS, tokens=eager.tokens)
    off, allowed = (
        sum((a.float() - b).abs().mean().item() for a, b in zip(run, exact, strict=True)) for run in (got, eager)
    )
    assert 0 < off <= 1.1 * allowed
