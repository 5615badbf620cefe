"""CPU kernels of `avl::partition_`, and of the choice of rows that leads to it, in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from avl_fx.kernels.native import bind, check_dtype

__all__ = ["forget_native", "partition_native", "reselect_native"]

_MoveSizes, _SelectSizes, _ForgetSizes = ctypes.c_int64 * 18, ctypes.c_int64 * 8, ctypes.c_int64 * 7
_pointer = ctypes.c_void_p


@cache
def _move() -> Callable[..., int] | None:
    arguments = [*[_pointer] * 4, _MoveSizes]
    return bind(Path(__file__).with_name("native.cpp"), "avl_partition", arguments, ctypes.c_int64)


@cache
def _reselect() -> Callable[..., int] | None:
    arguments = [*[_pointer] * 7, _SelectSizes]
    return bind(Path(__file__).with_name("native.cpp"), "avl_reselect", arguments, ctypes.c_int64)


@cache
def _forget() -> Callable[..., int] | None:
    arguments = [*[_pointer] * 9, _ForgetSizes, ctypes.c_double]
    return bind(Path(__file__).with_name("text_window.cpp"), "avl_forget", arguments, ctypes.c_int64)


def partition_native(caches: Sequence[Tensor], orders: Sequence[int], source: Tensor, slots: Tensor) -> bool:
    """`avl::partition_` of caches that are laid out alike.

    Args:
        caches: ``[batch, kv_heads, keys, dim]`` each.
        orders: which of the orders is a cache's.
        source: int64 ``[orders, batch, G, M]``.
        slots: int64 ``[orders, batch, G, M]``.

    Returns:
        Whether there is a compiler; otherwise nothing was done.

    Raises:
        IndexError: rows that are not there. The others have moved.
    """
    function = _move()
    if function is None:
        return False
    if caches[0].numel() == 0:
        return True
    batch, heads, keys, dim = caches[0].shape
    size, strides = caches[0].element_size(), caches[0].stride()
    sizes = _MoveSizes(
        *(len(caches), batch, heads, source.shape[3], dim * size, torch.get_num_threads()),
        *(stride * size for stride in strides[:3]),
        *source.expand(-1, -1, heads, -1).stride(),
        *slots.expand(-1, -1, heads, -1).stride(),
        keys,
    )
    numbers = (ctypes.c_int64 * len(orders))(*orders)
    if function(_addresses(caches), numbers, source.data_ptr(), slots.data_ptr(), sizes):
        raise IndexError(f"source, slots: a row beyond the {keys} of a cache.")  # as ATen raises it
    return True


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (_pointer * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def reselect_native(
    weights: Sequence[Tensor], slots: Tensor, tokens: Sequence[Tensor], core: Tensor, secondary: Tensor, room: int
) -> tuple[Tensor, Tensor] | None:
    """Pick core anew among secondary: the rows that change places, and ``tokens`` brought up to date.

    Args:
        weights: of each layer, float32 ``[batch, kv_heads, keys]``.
        slots: int64 ``[batch, visual]``.
        tokens: of each layer, int64 ``[batch, groups, visual]``, contiguous; groups is 1 (scores are shared) or
            ``kv_heads``.
        core: int64 ``[batch]``
        secondary: int64 ``[batch]``
        room: most entries of a row: twice the largest number of rows that may enter core.

    Returns:
        ``(source, slots)`` int64 ``[layers, batch, groups, moves]`` as `partition_native` takes them; ``None``: no
        compiler.
    """
    function = _reselect()
    if function is None:
        return None
    for rows, its_tokens in zip(weights, tokens, strict=True):
        check_dtype(torch.float32, weights=rows)
        check_dtype(torch.int64, tokens=its_tokens)
    check_dtype(torch.int64, slots=slots, core=core, secondary=secondary)
    layers, (batch, groups, visual) = len(tokens), tokens[0].shape
    source, target = (torch.empty(layers, batch, groups, room, dtype=torch.int64, device="cpu") for _ in range(2))
    rows_of, slots = [rows.contiguous() for rows in weights], slots.contiguous()
    heads, keys = weights[0].shape[1:]
    sizes = _SelectSizes(layers, batch, heads, groups, keys, visual, room, torch.get_num_threads())
    moves = function(
        *(_addresses(rows_of), slots.data_ptr(), _addresses(tokens), core.data_ptr(), secondary.data_ptr()),
        *(source.data_ptr(), target.data_ptr(), sizes),
    )
    return source[..., :moves], target[..., :moves]


def forget_native(
    weights: Tensor,
    slots: Tensor,
    tokens: Tensor,
    scores: Tensor,
    kept: Sequence[int],
    counts: Sequence[int],
    budgets: Sequence[int],
    quantile: float,
    entered: int | None,
) -> tuple[Tensor, Tensor] | None:
    """Score text rows by one softmax row, and drive out what is beyond the budget (`avl_fx.text_window`).

    Args:
        weights: float32 ``[batch, kv_heads, keys]``, contiguous.
        slots: int64 ``[batch, capacity]``: key positions of the text.
        tokens: int64 ``[batch, capacity]``: age of what lies in each slot; brought up to date.
        scores: float32 ``[batch, capacity]``; brought up to date.
        kept: for each row, how many of the first slots are read.
        counts: slots of each row in use.
        budgets: how many each row may keep.
        quantile: of the weights, taken off each of them; negative: nothing is.
        entered: age of the last slot in use, which is new; ``None``: it is not.

    Returns:
        ``(source, slots)`` int64 ``[batch, 1, moves]`` as `avl::partition_` takes them, perhaps no move;
        ``None`` where there is no compiler.
    """
    function = _forget()
    if function is None:
        return None
    check_dtype(torch.float32, weights=weights, scores=scores)
    check_dtype(torch.int64, slots=slots, tokens=tokens)
    batch, capacity = slots.shape
    appended = entered is not None
    room = 2 * max(1, *(k + appended - b for k, b in zip(kept, budgets, strict=True)))
    lists = [torch.tensor(numbers, dtype=torch.int64, device="cpu") for numbers in (kept, counts, budgets)]
    source, target = (torch.empty(batch, 1, room, dtype=torch.int64, device="cpu") for _ in range(2))
    tensors = (weights, slots, tokens, scores, *lists, source, target)
    sizes = _ForgetSizes(batch, weights.shape[1], weights.shape[2], capacity, room, int(appended), entered or 0)
    moves = function(*(tensor.data_ptr() for tensor in tensors), sizes, quantile)
    return source[..., :moves], target[..., :moves]
