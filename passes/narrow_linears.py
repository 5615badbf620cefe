"""On a CPU, linear layers on few rows, or in narrow numbers, go to a kernel that is made for them.

Once a step reads little of its cache, what is left is to read every weight, and a library call made for many rows takes
up to twice the time that memory needs for that (`avl_fx.kernels.narrow_linear`). Nothing is left out and the result is
the same up to the order of summation, so every plan does it, the identity plan too.

Processors without units for half precision leave such products to loops that take several times as long as those in
float32, whatever the number of rows. There all linear layers in half precision are taken, of prompts and of vision
encoders too: widened to float32 piece by piece, and rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from avl_fx.kernels.narrow_linear import MAX_ROWS, is_available, pays
from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import arg, fake, hint, op
from avl_fx.passes.rewrite import insert_call
from avl_fx.passes.site import PassResult

__all__ = ["narrow_linears"]


def narrow_linears(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Replace ``linear`` by `avl::narrow_linear` where that is the faster one and there is nothing to differentiate."""
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
    """Whether it has few rows, or numbers too narrow for the processor, and nothing to differentiate."""
    given, weight, out = fake(arg(node, 0, "input")), fake(arg(node, 1, "weight")), fake(node)
    if not all(isinstance(t, torch.Tensor) for t in (given, weight, out)):
        return False
    if hasattr(weight, "__tensor_flatten__"):  # a tensor subclass, such as a quantised weight: has a product of its own
        return False
    if out.device.type != "cpu" or out.requires_grad:
        return False
    if len({given.dtype, weight.dtype, out.dtype}) != 1 or not pays(out.dtype):
        return False
    if out.dtype.itemsize < torch.float32.itemsize:
        return True
    rows = [hint(n) for n in given.shape[:-1]]
    # With a symbolic number of rows that turns out large, the operator is an ordinary product.
    return None not in rows and math.prod(rows) <= MAX_ROWS  # type: ignore[arg-type]
