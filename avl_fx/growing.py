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

__all__ = ["GrowingCache", "claim", "has_room", "longer", "reserve"]

SPARE_ROWS = 256
"""Room for so many tokens at least, or for an eighth of those that are there; then a larger buffer is made."""

_ATTRIBUTE = "_avl_buffer"
_RETURNED = "_avl_returned"
"""On tensors that a decode graph made longer by copying them."""
_lock = threading.Lock()


@dataclass
class _Buffer:
    address: int
    taken: int
    """Rows that some view shows."""


def reserve(rows: Tensor, capacity: int | None = None) -> Tensor:
    """A copy of ``rows`` ``[batch, kv_heads, keys, dim]`` in a buffer with spare rows behind them.

    Args:
        rows: a cache tensor.
        capacity: rows of the buffer; by default as many as there are and `SPARE_ROWS` or an eighth more.
    """
    batch, heads, keys, dim = rows.shape
    if capacity is None:
        capacity = -(-(keys + max(SPARE_ROWS, keys // 8)) // 64) * 64
    buffer = rows.new_empty(batch, heads, capacity, dim)
    buffer[:, :, :keys].copy_(rows)
    return _view(buffer, keys, _Buffer(buffer.untyped_storage().data_ptr(), keys))


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
    copied = reserve(view, capacity=view.stride(1) // view.stride(2))
    getattr(copied, _ATTRIBUTE).taken = keys + 1
    return copied


def longer(claimed: Tensor) -> Tensor:
    """The view of one row more than ``claimed``, which was stored meanwhile; always with a spare row behind it."""
    keys = claimed.shape[2] + 1
    view = _view(claimed, keys, getattr(claimed, _ATTRIBUTE))
    return view if keys < claimed.stride(1) // claimed.stride(2) else reserve(view)


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
