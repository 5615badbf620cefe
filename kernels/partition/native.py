"""CPU kernels of `avl::partition_`, and of the choice of rows that leads to it, in C++."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from avl_fx.kernels.native import load

__all__ = ["partition_native", "reselect_native"]

_Sizes = ctypes.c_int64 * 14
_Few = ctypes.c_int64 * 7


@cache
def _library() -> ctypes.CDLL | None:
    library = load(Path(__file__).with_name("native.cpp"))
    if library is not None:
        pointer = ctypes.c_void_p
        library.avl_partition.argtypes = [pointer, pointer, pointer, _Sizes]
        library.avl_partition.restype = None
        library.avl_reselect.argtypes = [*[pointer] * 7, _Few]
        library.avl_reselect.restype = ctypes.c_int64
    return library


def partition_native(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> bool:
    """`avl::partition_`; see the schema for shapes. False: there is no compiler, and nothing was done."""
    library = _library()
    if library is None:
        return False
    for tensor in (key, value):
        if tensor is None or tensor.numel() == 0:
            continue
        batch, heads, _, dim = tensor.shape
        size, strides = tensor.element_size(), tensor.stride()
        from_, to = source.expand(-1, heads, -1).stride(), slots.expand(-1, heads, -1).stride()
        sizes = _Sizes(
            *(batch, heads, source.shape[2], dim * size, torch.get_num_threads()),
            *(stride * size for stride in strides[:3]),
            *from_,
            *to,
        )
        library.avl_partition(tensor.data_ptr(), source.data_ptr(), slots.data_ptr(), sizes)
    return True


def reselect_native(
    weights: Tensor, slots: Tensor, tokens: Tensor, core: Tensor, secondary: Tensor, room: int
) -> tuple[Tensor, Tensor] | None:
    """Pick core anew among secondary: the rows that change places, and ``tokens`` brought up to date.

    Args:
        weights: float32 ``[batch, kv_heads, keys]``.
        slots: int64 ``[batch, visual]``.
        tokens: int64 ``[batch, groups, visual]``, contiguous; groups is 1 (scores are shared) or ``kv_heads``.
        core: int64 ``[batch]``
        secondary: int64 ``[batch]``
        room: most entries of a row: twice the largest number of rows that may enter core.

    Returns:
        ``(source, slots)`` int64 ``[batch, groups, moves]`` as `avl::partition_` takes them; ``None``: no compiler.
    """
    library = _library()
    if library is None:
        return None
    batch, groups, visual = tokens.shape
    source, target = (torch.empty(batch, groups, room, dtype=torch.int64) for _ in range(2))
    tensors = (weights.contiguous(), slots.contiguous(), tokens, core, secondary, source, target)
    sizes = _Few(batch, weights.shape[1], groups, weights.shape[2], visual, room, torch.get_num_threads())
    moves = library.avl_reselect(*(tensor.data_ptr() for tensor in tensors), sizes)
    return source[..., :moves], target[..., :moves]
