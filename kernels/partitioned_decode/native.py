"""CPU kernel of `avl::partitioned_decode` in C++: one pass over the keys that are read, each key once for its group."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from avl_fx.kernels.native import bind
from avl_fx.kernels.partitioned_decode.capacity import check_spare_row

__all__ = ["is_available", "partitioned_decode_native"]

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MASKS = {torch.bool: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4, torch.float64: 5}
_POINTERS, _SIZES = struct.Struct("10N"), struct.Struct("24q")  # to pack them is much faster than to fill ctypes arrays
_NO_STRIDES = (0, 0, 0)


@cache
def _function() -> Callable[..., None] | None:
    arguments = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_float]
    return bind(Path(__file__).with_name("native.cpp"), "avl_partitioned_decode", arguments)


def is_available() -> bool:
    """Whether the kernel can be built and loaded here."""
    return _function() is not None


def partitioned_decode_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """`avl::partitioned_decode`; see the schema for shapes. ``None``: not for this dtype, or there is no compiler."""
    function, dtype = _function(), _DTYPES.get(query.dtype)
    if function is None or dtype is None or (mask is not None and mask.dtype not in _MASKS):
        return None
    batch, heads, _, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    value_dim = value.shape[3]
    query_strides, key_strides, value_strides = query.stride(), key.stride(), value.stride()
    if query_strides[3] != 1:
        query = query.contiguous()
        query_strides = query.stride()
    new_strides: tuple[int, ...] = (0, 0, 0, 0)
    seen = keys
    if new_key is not None and new_value is not None:
        check_spare_row(key)
        check_spare_row(value)
        new_key, new_value = _rows(new_key), _rows(new_value)
        new_strides = (*new_key.stride()[:2], *new_value.stride()[:2])
        seen += 1
    mask_kind, mask_strides = 0, _NO_STRIDES
    if mask is not None:
        mask_kind = _MASKS[mask.dtype]
        strides = mask.expand(batch, heads, 1, seen).stride()
        mask_strides = (strides[0], strides[1], strides[3])
    entries = -1
    if segments is not None:
        segments = segments.contiguous()
        entries = segments.shape[1]
    out = torch.empty((batch, heads, 1, value_dim), dtype=query.dtype)
    weights = torch.empty((batch, kv_heads, 0 if weigh is None else seen), dtype=torch.float32)
    pointers = _POINTERS.pack(
        query.data_ptr(),
        _start(key),
        _start(value),
        _address(new_key),
        _address(new_value),
        _address(mask),
        _address(segments),
        out.data_ptr(),
        _address(weigh),
        weights.data_ptr(),
    )
    sizes = _SIZES.pack(
        *(batch, heads, kv_heads, keys, head_dim, value_dim, entries, mask_kind, torch.get_num_threads()),
        *(query_strides[0], query_strides[1], *key_strides[:3], *value_strides[:3]),
        *new_strides,
        *mask_strides,
    )
    function(dtype, pointers, sizes, scale)
    return out, weights


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _start(view: Tensor) -> int:
    """Address of the first row, also of a view that has none yet (for which ``data_ptr`` is null)."""
    address = view.data_ptr()
    return address or view.untyped_storage().data_ptr() + int(view.storage_offset()) * view.element_size()


def _rows(new: Tensor) -> Tensor:
    return new if new.stride(3) == 1 else new.contiguous()
