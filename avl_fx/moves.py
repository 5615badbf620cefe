"""Rows of a cache that change places, in one layer or in several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Moves"]


@dataclass(frozen=True)
class Moves:
    """What `avl::partition_` is told, for each of ``layers``, which decide for themselves and for those that follow."""

    layers: tuple[int, ...]
    source: Tensor
    """int64 ``[layers, B, G, M]``: where each row comes from."""
    slots: Tensor
    """int64 ``[layers, B, G, M]``: where it goes; ``-1``: nowhere."""

    @classmethod
    def of(cls, layer: int, order: tuple[Tensor, Tensor]) -> Moves:
        """Those of one layer, by its ``(source, slots)`` int64 ``[B, G, M]``."""
        return cls.alike([layer], order)

    @classmethod
    def alike(cls, layers: Sequence[int], order: tuple[Tensor, Tensor]) -> Moves:
        """The same ``(source, slots)`` int64 ``[B, G, M]`` for all ``layers``."""
        source, slots = (index.expand(len(layers), -1, -1, -1) for index in order)
        return cls(tuple(layers), source, slots)

    def order(self, number: int) -> tuple[Tensor, Tensor]:
        """``(source, slots)`` of one of the layers, int64 ``[B, G, M]``."""
        return self.source[number], self.slots[number]
