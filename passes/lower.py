"""Canonical nodes become operators that Inductor knows."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

# Importing the operator registers it.
from avl_fx.kernels.attention import LOWERINGS
from avl_fx.kernels.attention import fused as _fused  # noqa: F401
from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import fake, op, tensor_inputs
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
        arguments = query, key, value, mask, scale, is_causal
        if _depends_on_data(node):
            lowered = insert_call(node, torch.ops.avl.fused_attention.default, *arguments)
        else:
            lowered = insert_traced(node, LOWERINGS[site.device], *arguments)
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


def _depends_on_data(node: fx.Node) -> bool:
    """Whether a size of attention that has no gradient depends on data."""
    tensors = [fake(n) for n in tensor_inputs(node)]
    return any(free_unbacked_symbols(t) for t in tensors) and not any(t.requires_grad for t in tensors)


def _layout_matters(node: fx.Node) -> bool:
    """Whether a user of ``node`` may ask for strides, as ``view`` does."""
    return any(
        op(user) not in _ANY_LAYOUT and (op(user) not in _SAME_LAYOUT or _layout_matters(user)) for user in node.users
    )
