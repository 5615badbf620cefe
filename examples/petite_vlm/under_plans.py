"""One model under several plans at once: copies that share every weight, each compiled under a plan of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

import avl_fx
from avl_fx import Plan

M = TypeVar("M", bound=nn.Module)


def allow_graphs() -> None:
    """Let Dynamo make more graphs than it would: each plan has its own, with and without gradients, for several shapes.

    Holds for the thread that asks.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


def under_plans(model: M, plans: Sequence[Plan], compiler: str = "eager") -> tuple[M, ...]:
    """A copy of ``model`` for each plan; where there is none, the model as it is.

    Training any of them trains the model: there is one set of weights.

    Raises:
        PlanError: a plan is wrong, or made for another depth.
    """
    if not plans:
        return (model,)
    allow_graphs()
    copies = []
    for plan in plans:
        weights: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        copies.append(copy.deepcopy(model, weights))
        avl_fx.compile(copies[-1], plan, options={"compiler": compiler, "strict": True})
    return tuple(copies)


def in_mode(plan: Plan) -> str:
    """What tables put behind a name that stands for answers under a plan."""
    return f", {plan.lazy_policy.mode}" if plan.lazy_policy is not None else ""
