"""CPU implementation of `avl::narrow_linear`: the C++ kernel for a few rows, ATen for the rest."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from avl_fx.kernels.narrow_linear.native import narrow_linear_native, pays

HALVES = (torch.float16, torch.bfloat16)
WIDENED_AT_ONCE = 1 << 22
"""Elements of a weight that are held in float32 at a time: 16 MiB."""


def narrow_linear_cpu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`avl::narrow_linear` on CPU; see the schema for shapes."""
    done = narrow_linear_native(input, weight, bias)
    if done is not None:
        return done
    if input.dtype == weight.dtype and weight.dtype in HALVES and pays(weight.dtype):
        return _widened(input, weight, bias)
    return linear(input, weight, bias).contiguous()


def _widened(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product in float32, rounded once, of some rows of the weight at a time."""
    wide, features = weight.shape
    given, step = input.to(torch.float32), max(1, WIDENED_AT_ONCE // max(features, 1))
    out = torch.empty((*input.shape[:-1], wide), dtype=weight.dtype, device=weight.device)
    for start in range(0, wide, step):
        rows = slice(start, start + step)
        added = None if bias is None else bias[rows].to(torch.float32)
        out[..., rows] = linear(given, weight[rows].to(torch.float32), added)
    return out
