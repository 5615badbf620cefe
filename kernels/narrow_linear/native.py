"""CPU kernel of `avl::narrow_linear` in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from avl_fx.kernels.narrow_linear.schema import MAX_ROWS
from avl_fx.kernels.native import bind, has_units

__all__ = ["is_available", "narrow_linear_native", "pays"]

_Sizes = ctypes.c_int64 * 7
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def _function() -> Callable[..., None] | None:
    return bind(Path(__file__).with_name("native.cpp"), "avl_narrow_linear", [*[ctypes.c_void_p] * 4, _Sizes])


def is_available() -> bool:
    """Whether the kernel can be built and loaded here."""
    return _function() is not None


def pays(dtype: torch.dtype) -> bool:
    """Whether the kernel is the faster one for ``dtype`` on this processor.

    Where it multiplies in half precision by itself, ATen's libraries do so, and are left alone.
    """
    return dtype == torch.float32 or (dtype in _KINDS and not has_units(dtype))


def narrow_linear_native(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`avl::narrow_linear`; see the schema for shapes. ``None``: not for these tensors, or there is no compiler."""
    function = _function()
    kind = _KINDS.get(weight.dtype)
    if function is None or kind is None or input.dtype != weight.dtype:
        return None
    wide, features = weight.shape
    if input.shape[-1] != features or weight.stride(1) != 1 or (bias is not None and bias.shape != (wide,)):
        return None
    rows = input.numel() // max(features, 1)
    if rows > MAX_ROWS:
        return None
    if bias is not None:
        bias = bias.to(weight.dtype).contiguous()
    out = torch.empty((*input.shape[:-1], wide), dtype=weight.dtype, device="cpu")
    # Each of its elements meets every row of the weight: widened once.
    input = input.to(torch.float32).contiguous()
    sizes = _Sizes(rows, features, wide, features, weight.stride(0), torch.get_num_threads(), kind)
    function(input.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), sizes)
    return out
