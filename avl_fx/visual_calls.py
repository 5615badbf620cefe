"""The inputs that tell a graph which positions are visual, for lazy layers that inherit at those alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from avl_fx.modality import given_rows
from avl_fx.partition import Partition, ranges_of
from avl_fx.passes.context import Size, VisualInputs

__all__ = ["VisualCalls"]

log = logging.getLogger("avl_fx")


@dataclass(frozen=True)
class VisualCalls:
    """Serves the calls of one graph. What is not known is text: a lazy layer then attends with what is its own."""

    batch: Size
    queries: Size
    takes_new: bool
    takes_past: bool
    starts: bool
    shown: bool
    device: torch.device

    @classmethod
    def of(cls, inputs: VisualInputs) -> VisualCalls | None:
        """What serves a graph with ``inputs``; ``None`` where it takes none."""
        taken = [n for n in (inputs.new, inputs.past) if n is not None]
        if not taken:
            return None
        assert inputs.batch is not None
        device = taken[0].meta["example_value"].device
        queries = 1 if inputs.queries is None else inputs.queries
        new, past = inputs.new is not None, inputs.past is not None
        return cls(inputs.batch, queries, new, past, inputs.starts, inputs.shown, device)

    def new(self, args: Sequence[Any], tokens: int | None, visual: Tensor | None) -> tuple[Tensor, ...]:
        """Ranges of this forward's visual positions, counted from its first.

        Args:
            args: the graph's own inputs.
            tokens: how many the cache holds before this forward; ``None``: not known.
            visual: bool ``[batch, queries]``, what rides on ``args``; ``None``: nothing does.
        """
        if not self.takes_new:
            return ()
        batch, queries = _size(self.batch, args), _size(self.queries, args)
        tokens = 0 if self.starts else tokens
        if visual is None and not self.shown:
            visual = given_rows(queries, tokens)
        if visual is not None and visual.shape != (batch, queries):
            log.warning("visual positions %s do not fit %d rows of %d tokens", tuple(visual.shape), batch, queries)
            visual = None
        return (self._ranges(None if visual is None else ranges_of(visual), visual is not None, batch),)

    def sizes(self, args: Sequence[Any]) -> tuple[int, int] | None:
        """Batch size and length of this forward, where the graph is told which positions are visual."""
        told = self.takes_new and not self.shown
        return (_size(self.batch, args), _size(self.queries, args)) if told else None

    def past(self, args: Sequence[Any], state: Partition | None) -> tuple[Tensor, ...]:
        """Ranges of the visual keys that are in the cache; ``state`` is what is known of it."""
        if not self.takes_past:
            return ()
        ranges = None if state is None else state.visual_segments
        return (self._ranges(ranges, state is not None, _size(self.batch, args)),)

    def _ranges(self, ranges: Tensor | None, known: bool, batch: int) -> Tensor:
        if ranges is not None:
            return ranges.to(self.device)
        if known:
            log.warning("too many spans of visual tokens in a row (%d fit): lazy layers attend densely", MAX_SEGMENTS)
        return torch.zeros(batch, MAX_SEGMENTS, 2, dtype=torch.int64, device=self.device)


def _size(size: Size, args: Sequence[Any]) -> int:
    if isinstance(size, int):
        return size
    position, dim = size
    return int(args[position] if dim is None else args[position].shape[dim])
