"""CPU kernel of `avl::narrow_linear` in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from avl_fx.kernels.narrow_linear.schema import MAX_ROWS
from avl_fx.kernels.native import bind

__all__ = ["is_available", "narrow_linear_native"]

_Sizes = ctypes.c_int64 * 6


@cache
def _function() -> Callable[..., None] | None:
    return bind(Path(__file__).with_name("native.cpp"), "avl_narrow_linear", [*[ctypes.c_void_p] * 4, _Sizes])


def is_available() -> bool:
    """Whether the kernel can be built and loaded here."""
    return _function() is not None


def narrow_linear_native(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`avl::narrow_linear`; see the schema for shapes. ``None``: not for these tensors, or there is no compiler."""
    function = _function()
    if function is None or input.dtype != torch.float32 or weight.dtype != torch.float32:
        return None
    wide, features = weight.shape
    if input.shape[-1] != features or weight.stride(1) != 1 or (bias is not None and bias.shape != (wide,)):
        return None
    rows = input.numel() // max(features, 1)
    if rows > MAX_ROWS:
        return None
    input = input.contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    out = torch.empty((*input.shape[:-1], wide), dtype=torch.float32, device="cpu")
    sizes = _Sizes(rows, features, wide, features, weight.stride(0), torch.get_num_threads())
    function(input.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), sizes)
    return out
