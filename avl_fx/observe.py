"""Attention rows on their way from compiled graphs to whoever calibrates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from avl_fx._compat import gather_over
from avl_fx.passes.context import ObservedAttention
from avl_fx.record import GraphRecord

__all__ = ["ObservedForward", "ObservedGraph", "Observer", "active_observer", "observing"]


@dataclass(frozen=True)
class ObservedForward:
    """One call of a graph that holds a part of a prompt's decoder."""

    attention: ObservedAttention
    """What the graph observes and why not the rest; knows none of the graph's nodes."""
    record: GraphRecord
    rows: Mapping[int, Tensor]
    """Layer -> softmax of the last real query, float32 ``[batch, heads, keys]``, of the heads of all processes."""
    visual: Tensor | None
    """Visual positions bool ``[batch, sequence]`` of the forward, where known."""
    positions: Tensor | None
    """Key positions of the queries, in a static cache; int64 ``[queries]``."""

    def visual_keys(self, keys: int) -> Tensor | None:
        """Visual positions among ``keys`` keys, bool ``[batch, keys]``; ``None`` where they are unknown or do not fit.

        Without a static cache the forward's own positions are the last keys.
        """
        visual = self.visual
        if visual is None or visual.shape[1] > keys:
            return None
        seen = torch.zeros(visual.shape[0], keys, dtype=torch.bool, device=visual.device)
        if self.positions is None:
            seen[:, keys - visual.shape[1] :] = visual
        elif len(self.positions) == visual.shape[1] and int(self.positions[-1]) < keys:
            seen[:, self.positions.to(visual.device)] = visual
        else:
            return None
        return seen


@dataclass
class Observer:
    """Collects what the graphs of one forward, or of several, return."""

    forwards: list[ObservedForward] = field(default_factory=list)


_active: ContextVar[Observer | None] = ContextVar("avl_fx_observer", default=None)


def active_observer() -> Observer | None:
    """The observer of the `observing` block that is open, if any."""
    return _active.get()


@contextlib.contextmanager
def observing() -> Iterator[Observer]:
    """Let graphs that are compiled inside the block return attention rows, and collect them."""
    observer = Observer()
    token = _active.set(observer)
    try:
        yield observer
    finally:
        _active.reset(token)


@dataclass(frozen=True)
class ObservedGraph:
    """Serves the calls of one graph that returns attention rows."""

    attention: ObservedAttention
    record: GraphRecord
    returned: int
    """Outputs beyond the model's own: a row for each layer, then the positions of a static cache."""

    @classmethod
    def of(cls, attention: ObservedAttention, record: GraphRecord) -> ObservedGraph:
        """What serves a graph that meets it as ``attention`` says."""
        layers = [replace(layer, rows=None) for layer in attention.layers]
        # The number of outputs says whether positions are among them.
        return cls(replace(attention, layers=layers, positions=None), record, len(attention.returned()))

    def finish(self, returned: Sequence[Tensor], visual: Tensor | None) -> None:
        """Hand on what one call returned, if somebody observes."""
        observer = active_observer()
        if observer is None:
            return
        layers = self.attention.layers
        rows = {layer.layer: row.detach() for layer, row in zip(layers, returned, strict=False)}
        group = self.attention.process_group
        if group is not None:
            rows = {layer: gather_over(group, row, dim=1) for layer, row in rows.items()}
        positions = returned[len(layers)] if len(returned) > len(layers) else None
        observer.forwards.append(ObservedForward(self.attention, self.record, rows, visual, positions))
