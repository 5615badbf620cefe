"""The plans that are asked, and a run of one of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import avl_fx
from avl_fx import AVLCache, Plan
from tests.zoo import ZOO
from tests.zoo._run import Run, prefill_and_decode

STEPS = 5
TOKENS = torch.arange(3 * STEPS + 3).reshape(3, STEPS + 1)
_AVL = Plan.avl(core=0.3, secondary=0.5, refresh=3, text=0.6, text_minimum=4)
CASES: dict[str, tuple[Plan, str]] = {
    "identity": (Plan.identity(), "static"),
    "gla": (Plan.lazy([(0, 2)]), "dynamic"),
    "vla_scores": (Plan.lazy([(0, 2)], "vla_scores"), "dynamic"),
    "avl": (_AVL, "static"),
    "both": (_AVL.combine(Plan.lazy([(0, 2)])), "compact"),
}
"""Plan and cache; AVLCache is "compact"."""
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder, by name."""
    inside = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return {name: m for name, m in inside if "language_model.layers" in name}


def run(prepare: Callable[[nn.Module], Any], case: str) -> Run:
    """LLaVA as ``prepare`` changed it, compiled under the plan of ``case``, along the same tokens."""
    plan, cache = CASES[case]
    torch._dynamo.reset()
    zoo = ZOO["llava"]
    model = prepare(zoo.make())
    inputs = zoo.inputs(model, batch=3)
    avl_fx.compile(model, plan, options={"compiler": "eager", "strict": True})
    kept = AVLCache(plan, model.config) if cache == "compact" else cache
    return prefill_and_decode(model, inputs, kept, steps=STEPS, tokens=TOKENS)
