"""A default dtype that the server sets changes nothing: no buffer of ours is made after it.

In half precision a C++ kernel would write float32 beyond the end of such a buffer.
"""

import pytest
import torch

from avl_fx import AVLCache, Plan
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS = 8
AVL = Plan.avl(core=0.3, secondary=0.5, refresh=3, text=0.6, text_minimum=4)
PLANS = {
    "gla": Plan.lazy([(0, 2)]),
    "vla_scores": Plan.lazy([(0, 2)], "vla_scores"),
    "avl": AVL,
    "both": AVL.combine(Plan.lazy([(0, 2)])),
    "filtered": Plan.avl(core=0.3, secondary=0.5, refresh=3, prefill=0.6, prefill_after_layer=0),
}
CASES = [*((name, "dynamic") for name in PLANS if name != "filtered"), ("both", "compact"), ("filtered", "compact")]


def run(plan, cache, default):
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=3)
    tokens = torch.arange(3 * STEPS + 3).reshape(3, STEPS + 1)
    with through("avl_fx.compile", model, compiler="eager", plan=plan):
        torch.set_default_dtype(default)
        try:
            kept = AVLCache(plan, model.config) if cache == "compact" else cache
            return prefill_and_decode(model, inputs, kept, steps=STEPS, tokens=tokens)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("plan", "cache"), rest_in_matrix(CASES, CASES[-1:], apart=True))
@pytest.mark.parametrize("default", rest_in_matrix([torch.bfloat16, torch.float64], [torch.bfloat16]), ids=str)
def test_logits_do_not_change(plan, cache, default):
    expected = run(PLANS[plan], cache, torch.float32)
    got = run(PLANS[plan], cache, default)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
