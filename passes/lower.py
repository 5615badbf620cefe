"""Canonical nodes become operators that Inductor knows."""

from __future__ import annotations

import torch
from torch import fx

from avl_fx.kernels.attention import LOWERINGS
from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import op
from avl_fx.passes.rewrite import insert_call, insert_traced, remove_dead
from avl_fx.passes.site import PassResult, Status

__all__ = ["lower"]

_ANY_LAYOUT = frozenset({"reshape", "contiguous", "linear", "flatten", "matmul"})
"""Take any memory layout and hand on none."""
_SAME_LAYOUT = frozenset({"transpose", "permute", "mul", "add", "to"})
"""Hand the layout of their input on."""


def lower(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Replace every `avl::attention` node by its device's lowering, written out as plain PyTorch calls."""
    result = PassResult("lower")
    for node in list(gm.graph.nodes):
        if node.target is not torch.ops.avl.attention.default:
            continue
        query, key, value, mask, scale, is_causal, index = node.args
        site = ctx.sites[index]
        lowered = insert_traced(node, LOWERINGS[site.device], query, key, value, mask, scale, is_causal)
        if site.style == "softmax" and _layout_matters(node):
            # A matmul returns a contiguous tensor and the model may rely on it (`view`); SDPA promises no layout.
            lowered = insert_call(node, "contiguous", lowered)
        node.replace_all_uses_with(lowered)
        site.node = lowered
        if site.status is Status.FOUND:
            site.status = Status.REWRITTEN
        result.count += 1
    remove_dead(gm.graph, ctx.initially_unused, keep=ctx.keep())
    return result


def _layout_matters(node: fx.Node) -> bool:
    """Whether a user of ``node`` may ask for strides, as ``view`` does."""
    return any(
        op(user) not in _ANY_LAYOUT and (op(user) not in _SAME_LAYOUT or _layout_matters(user)) for user in node.users
    )
