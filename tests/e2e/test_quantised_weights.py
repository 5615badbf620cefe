"""Weights that are tensor subclasses, as quantisation libraries make them, keep their own products.

The subclass knows the few operators that a model needs, as theirs do, and refuses all others: an operator of ours on
such a weight would fail while the graph is rewritten.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from avl_fx import AVLCache, Plan
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, largest, through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS = 4
SHARES = {"core": 0.3, "secondary": 0.5, "refresh": 3, "text": 0.6, "text_minimum": 4}
PLANS = {
    "identity": Plan.identity(),
    "gla": Plan.lazy([(0, 2)]),
    "vla_scores": Plan.lazy([(0, 2)], "vla_scores"),
    "avl": Plan.avl(**SHARES),
}
_CARRIED = (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default)


class Int8Weight(Tensor):
    """``[out, in]`` in 8 bits with one scale a row; to the model a float32 weight."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Int8Weight":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["scale"])

    def dequantise(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            given, weight, *bias = args
            return nn.functional.linear(given, weight.dequantise(), *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in _CARRIED:
            return tree_map(lambda t: cls(function(t.codes), function(t.scale)) if isinstance(t, cls) else t, args[0])
        raise NotImplementedError(f"{function} of a quantised weight")


def quantise(model: nn.Module, to: str) -> nn.Module:
    """Give the decoder's linear layers weights that are "quantised", or "plain" ones that equal these."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "language_model.layers" in name:
            weight = module.weight.detach()
            scale = weight.abs().amax(1, keepdim=True) / 127
            quantised = Int8Weight((weight / scale).round().to(torch.int8), scale)
            kept = quantised if to == "quantised" else quantised.dequantise()
            module.weight = nn.Parameter(kept, requires_grad=False)
    return model


CASES = [*((name, "dynamic") for name in PLANS), ("avl", "compact")]


def run(to, plan, door, cache):
    zoo = ZOO["llava"]
    model = quantise(zoo.make(), to).requires_grad_(False)
    inputs = zoo.inputs(model, batch=2)
    tokens = torch.arange(2 * STEPS + 2).reshape(2, STEPS + 1)
    with through(door, model, compiler="eager", plan=plan) as recorder:
        kept = AVLCache(plan, model.config) if cache == "compact" else cache
        return prefill_and_decode(model, inputs, kept, steps=STEPS, tokens=tokens), recorder


@pytest.mark.parametrize("door", rest_in_matrix(DOORS, DOORS[:1]))
@pytest.mark.parametrize(("plan", "cache"), rest_in_matrix(CASES, CASES[-1:], apart=True))
def test_logits_are_those_of_the_weights_they_stand_for(plan, cache, door):
    expected, plain = run("plain", PLANS[plan], door, cache)
    got, recorder = run("quantised", PLANS[plan], door, cache)
    assert largest(got, expected) < FLOAT32_TOLERANCE
    actions = [[site.action for site in graph.sites] for graph in recorder.graphs]
    assert actions == [[site.action for site in graph.sites] for graph in plain.graphs]
