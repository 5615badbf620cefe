"""CPU kernel of `avl::partitioned_decode` in C++: one pass over the keys that are read, each key once for its group."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from avl_fx.kernels.native import bind, check_dtype, dispatches
from avl_fx.kernels.partitioned_decode.capacity import check_spare_row

__all__ = ["is_available", "is_dispatched", "partitioned_decode_native", "run"]

_SOURCE = Path(__file__).with_name("native.cpp")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MASKS = {torch.bool: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4, torch.float64: 5}
_POINTERS, _SIZES = struct.Struct("16N"), struct.Struct("36q")  # to pack them is much faster than to fill ctypes arrays
_NO_STRIDES: tuple[int, ...] = (0, 0, 0)


@cache
def _function() -> Callable[..., None] | None:
    arguments = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_float]
    return bind(_SOURCE, "avl_partitioned_decode", arguments)


def is_available() -> bool:
    """Whether the kernel can be built and loaded here."""
    return _function() is not None


def is_dispatched() -> bool:
    """Whether calls reach it without passing through Python."""
    return dispatches(_SOURCE)


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
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`avl::partitioned_decode`; see the schema for shapes. ``None``: not for this dtype, or there is no compiler.

    Args:
        kept: receives the logits of what is read; float32 ``[batch, heads, K']``, contiguous, -inf so far.
    """
    if new_key is not None:
        check_spare_row(key)
        check_spare_row(value)
    cache, new = (key, value), (new_key, new_value)
    return run(query, *cache, *new, mask, segments, weigh, scale, kept=kept, heads=query.shape[1], dtype=query.dtype)


def run(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
    scale: float,
    *,
    heads: int,
    dtype: torch.dtype,
    kept: Tensor | None = None,
    logits: Tensor | None = None,
    inherited: Tensor | None = None,
    anchor_key: Tensor | None = None,
    rotated: Tensor | None = None,
    new_rotated: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The C++ function behind `avl::partitioned_decode` and the operators that are made from it.

    Args:
        query: absent where no product with a key is wanted, and then ``key`` is, too.
        heads: query heads.
        dtype: of the query, and of the result.
        kept: as in `partitioned_decode_native`.
        logits: float32 ``[batch, heads, K']``: taken in place of products.
        inherited: int64 ``[batch, S, 2]``: the keys for which they are; ``None``: for all, where there are any. ``key``
            may lack the first of them.
        anchor_key: ``[batch, kv_heads, keys, head_dim]``: keys in place of logits.
        rotated: ``[batch, kv_heads, keys, rope_dim]``: what stands behind each key; a query has as much more.
        new_rotated: the row of this step's token, ``[batch, kv_heads, 1, rope_dim]``; its key is its value.
    """
    function, code = _function(), _DTYPES.get(dtype)
    if function is None or code is None or (mask is not None and mask.dtype not in _MASKS):
        return None
    if kept is not None:
        check_dtype(torch.float32, kept=kept)
    batch, kv_heads, keys, value_dim = value.shape
    head_dim = 0 if key is None else key.shape[3]
    value_strides = value.stride()
    query_strides = key_strides = new_key_strides = new_value_strides = anchor_strides = _NO_STRIDES
    left_out = anchor_keys = 0
    if query is not None and key is not None:
        query = _rows(query)
        query_strides, key_strides = query.stride()[:3], key.stride()[:3]
        left_out = keys - key.shape[2]
    if anchor_key is not None:
        anchor_keys, anchor_strides = anchor_key.shape[2], anchor_key.stride()[:3]
    rotated_dim, rotated_strides, new_rotated_strides = 0, _NO_STRIDES, _NO_STRIDES
    if rotated is not None:
        rotated_dim, rotated_strides = rotated.shape[3], rotated.stride()[:3]
    if new_rotated is not None:
        new_rotated = _rows(new_rotated)
        new_rotated_strides = new_rotated.stride()[:3]
    seen = keys
    if new_value is not None:
        new_value = _rows(new_value)
        new_value_strides = new_value.stride()[:3]
        seen += 1
    if new_key is not None:
        new_key = _rows(new_key)
        new_key_strides = new_key.stride()[:3]
    mask_kind, mask_strides = 0, _NO_STRIDES
    if mask is not None:
        mask_kind = _MASKS[mask.dtype]
        strides = mask.expand(batch, heads, 1, seen).stride()
        mask_strides = (strides[0], strides[1], strides[3])
    entries = inherited_entries = -1
    if segments is not None:
        segments = segments.contiguous()
        entries = segments.shape[1]
    if inherited is not None:
        inherited = inherited.contiguous()
        inherited_entries = inherited.shape[1]
    out = torch.empty((batch, heads, 1, value_dim), dtype=dtype, device="cpu")
    weights = torch.empty((batch, kv_heads, 0 if weigh is None else seen), dtype=torch.float32, device="cpu")
    pointers = _POINTERS.pack(
        _address(query),
        0 if key is None else _start(key),
        _start(value),
        _address(new_key),
        _address(new_value),
        _address(mask),
        _address(segments),
        out.data_ptr(),
        _address(weigh),
        weights.data_ptr(),
        _address(kept),
        _address(logits),
        _address(inherited),
        0 if anchor_key is None else _start(anchor_key),
        0 if rotated is None else _start(rotated),
        _address(new_rotated),
    )
    sizes = _SIZES.pack(
        *(batch, heads, kv_heads, keys, head_dim, value_dim, entries, inherited_entries),
        *(mask_kind, torch.get_num_threads()),
        *(query_strides[0], query_strides[1], *key_strides, *value_strides[:3]),
        *(new_key_strides[0], new_key_strides[1], new_value_strides[0], new_value_strides[1]),
        *mask_strides,
        *(left_out, anchor_keys, *anchor_strides),
        *(rotated_dim, *rotated_strides, *new_rotated_strides[:2]),
    )
    function(code, pointers, sizes, scale)
    return out, weights


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _start(view: Tensor) -> int:
    """Address of the first row, also of a view that has none yet (for which ``data_ptr`` is null)."""
    address = view.data_ptr()
    return address or view.untyped_storage().data_ptr() + int(view.storage_offset()) * view.element_size()


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()
