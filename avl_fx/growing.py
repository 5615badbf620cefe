"""Caches that grow in place: tensors that are the occupied part of a buffer with room behind their end.

A longer cache is a longer view of the same buffer, so a row is stored without copying the others. That is safe as long
as only the longest view of a buffer grows: rows that any view shows are never written. A buffer therefore knows how
many of its rows are taken, and a view that is not its newest one (a cache was cropped, or continued twice from one
point) is copied first.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from avl_fx.passes.context import GrowingTensor

__all__ = ["COMPACT_SPARE_ROWS", "GrowingCache", "claim", "has_room", "longer", "reserve", "room", "shorter"]

SPARE_ROWS = 256
"""Room for so many tokens at least, or for an eighth of those that are there; then a larger buffer is made."""

COMPACT_SPARE_ROWS = 32
"""The same for a cache that is there to save memory."""

_ATTRIBUTE = "_avl_buffer"
_RETURNED = "_avl_returned"
"""On tensors that a decode graph made longer by copying them."""
_lock = threading.Lock()


@dataclass
class _Buffer:
    address: int
    taken: int
    """Rows that some view shows."""
    spare: int
    """Least number of spare rows of the buffer that takes its place."""


def reserve(rows: Tensor, capacity: int | None = None, spare: int | None = None) -> Tensor:
    """A copy of ``rows`` ``[batch, kv_heads, keys, dim]`` in a buffer with spare rows behind them.

    Args:
        rows: a cache tensor.
        capacity: rows of the buffer; by default as many as there are and ``spare`` or an eighth more.
        spare: least number of spare rows, of this buffer and of those that take its place when it is full; by default
            `SPARE_ROWS`.
    """
    keys = rows.shape[2]
    view = room(rows, keys, capacity, spare)
    view.copy_(rows)
    return view


def room(like: Tensor, keys: int, capacity: int | None = None, spare: int | None = None) -> Tensor:
    """As `reserve`, for ``keys`` rows that are still to be written; sizes, dtype and device of ``like``."""
    batch, heads, _, dim = like.shape
    spare = SPARE_ROWS if spare is None else spare
    if capacity is None:
        capacity = -(-(keys + max(spare, keys // 8)) // 64) * 64
    buffer = like.new_empty(batch, heads, capacity, dim)
    return _view(buffer, keys, _Buffer(buffer.untyped_storage().data_ptr(), keys, spare))


def has_room(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a view that `reserve` or `longer` made."""
    return hasattr(tensor, _ATTRIBUTE)


def claim(view: Tensor) -> Tensor:
    """The right to append a row behind ``view``: itself if it is the newest view of its buffer, else a copy.

    The copy has the strides of ``view``, which must leave room for a row in each head.
    """
    buffer, keys = getattr(view, _ATTRIBUTE, None), view.shape[2]
    if buffer is not None and buffer.address == view.untyped_storage().data_ptr():
        with _lock:
            if buffer.taken == keys:
                buffer.taken = keys + 1
                return view
    spare = None if buffer is None else buffer.spare
    copied = reserve(view, view.stride(1) // view.stride(2), spare)
    getattr(copied, _ATTRIBUTE).taken = keys + 1
    return copied


def longer(claimed: Tensor) -> Tensor:
    """The view of one row more than ``claimed``, which was stored meanwhile; always with a spare row behind it."""
    keys, buffer = claimed.shape[2] + 1, getattr(claimed, _ATTRIBUTE)
    view = _view(claimed, keys, buffer)
    return view if keys < claimed.stride(1) // claimed.stride(2) else reserve(view, spare=buffer.spare)


def shorter(view: Tensor, keys: int) -> Tensor:
    """``view`` without its rows from ``keys`` on, which nobody else shows: the next one is stored there again."""
    buffer = getattr(view, _ATTRIBUTE, None)
    if keys == view.shape[2]:
        return view
    if buffer is None:
        return view[:, :, :keys]
    with _lock:
        buffer.taken = keys
    return _view(view, keys, buffer)


def _view(buffer: Tensor, keys: int, owner: _Buffer) -> Tensor:
    batch, heads, _, dim = buffer.shape
    view = buffer.as_strided((batch, heads, keys, dim), buffer.stride())
    setattr(view, _ATTRIBUTE, owner)
    return view


@dataclass(frozen=True)
class GrowingCache:
    """Serves the calls of one graph: hands out room before, makes views longer after."""

    tensors: Sequence[GrowingTensor] = ()
    """A decode graph's: stored into during the call."""
    reserve: Sequence[int] = ()
    """A prompt's: outputs that get spare rows."""
    adopt: Sequence[GrowingTensor] = ()
    """A decode graph's that copies: outputs that get room if their input came back as such a graph returned it."""

    def before(self, args: Sequence[Any]) -> list[Any]:
        """The graph's inputs, with room behind those that grow; of the same sizes and strides."""
        args = list(args)
        for tensor in self.tensors:
            args[tensor.before] = claim(args[tensor.before])
        return args

    def after(self, args: Sequence[Any], outputs: list[Any]) -> None:
        """Put the longer views where the model expects its cache; ``args`` as `before` returned them."""
        for tensor in self.tensors:
            outputs[tensor.output] = longer(args[tensor.before])
        for position in self.reserve:
            rows = outputs[position]
            if isinstance(rows, Tensor) and not rows.requires_grad and rows.dim() == 4:
                outputs[position] = reserve(rows)
        for tensor in self.adopt:
            if getattr(args[tensor.before], _RETURNED, False):
                outputs[tensor.output] = reserve(outputs[tensor.output])
            else:
                setattr(outputs[tensor.output], _RETURNED, True)
