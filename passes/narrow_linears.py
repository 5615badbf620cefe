"""On a CPU, linear layers on the few rows of a decode step go to a kernel that is made for them.

Once a step reads little of its cache, what is left is to read every weight, and a library call made for many rows takes
up to twice the time that memory needs for that (`avl_fx.kernels.narrow_linear`). Nothing is left out and the result is
the same up to the order of summation, so every plan does it, the identity plan too.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from avl_fx.kernels.narrow_linear import MAX_ROWS, is_available
from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import arg, fake, hint, op
from avl_fx.passes.rewrite import insert_call
from avl_fx.passes.site import PassResult

__all__ = ["narrow_linears"]


def narrow_linears(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Replace ``linear`` by `avl::narrow_linear` where it has few rows and nothing to differentiate."""
    result = PassResult("narrow_linears")
    nodes = [n for n in gm.graph.nodes if op(n) == "linear" and _is_narrow(n)]
    if not nodes or not is_available():
        return result
    for node in nodes:
        arguments = (arg(node, 0, "input"), arg(node, 1, "weight"), arg(node, 2, "bias"))
        narrow = insert_call(node, torch.ops.avl.narrow_linear.default, *arguments)
        node.replace_all_uses_with(narrow)
        gm.graph.erase_node(node)
        result.count += 1
    return result


def _is_narrow(node: fx.Node) -> bool:
    given, weight, out = fake(arg(node, 0, "input")), fake(arg(node, 1, "weight")), fake(node)
    if not all(isinstance(t, torch.Tensor) for t in (given, weight, out)):
        return False
    if hasattr(weight, "__tensor_flatten__"):  # a tensor subclass, such as a quantised weight: has a product of its own
        return False
    if out.device.type != "cpu" or {given.dtype, weight.dtype, out.dtype} != {torch.float32} or out.requires_grad:
        return False
    rows = [hint(n) for n in given.shape[:-1]]
    # With a symbolic number of rows that turns out large, the operator is an ordinary product.
    return None not in rows and math.prod(rows) <= MAX_ROWS  # type: ignore[arg-type]
