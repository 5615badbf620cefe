"""What the backend remembers of each graph it compiled: the raw material of `explain`."""

from __future__ import annotations

import contextlib
import enum
import weakref
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor, nn

from avl_fx.passes.context import DroppedKeys
from avl_fx.passes.site import PassResult, Site
from avl_fx.reads import PromptRow

__all__ = [
    "DecodeStep",
    "Division",
    "GraphRecord",
    "Recorder",
    "Undivided",
    "active_recorder",
    "note_division",
    "recording",
]


class Undivided(enum.StrEnum):
    """Why the cache of a prompt was not partitioned: its steps read every key. The value is what `explain` prints."""

    UNKNOWN = "visual positions unknown"
    NO_VISUAL = "no visual tokens"
    MISFIT = "visual positions do not fit the cache"
    HIDDEN = "the attention mask hides visual keys"
    BIASED = "the attention mask weighs keys by their place"
    RANGES = "too many ranges of keys in a row"
    TRAINING = "gradients are recorded"


Division = tuple[PromptRow, ...] | Undivided
"""What became of the cache after a prompt: partitioned, with so many keys in each batch row, or not."""


@dataclass(frozen=True)
class DecodeStep:
    """One decode step of a graph that reads key ranges, as the runtime ran it."""

    graph: int
    reads: str
    """``core`` or ``secondary`` (text with either); ``all``: the cache had no valid state."""
    number: int = 0
    """1, 2, ... since the prompt; 0 where there was no state."""
    keys: int = 0
    """Tokens fed so far, this step's included; 0 where there was no state."""


@dataclass
class GraphRecord:
    """One graph that passed through the backend."""

    index: int
    nodes_before: int
    nodes_after: int = 0
    sites: list[Site] = field(default_factory=list)
    passes: list[PassResult] = field(default_factory=list)
    dropped_keys: list[DroppedKeys] = field(default_factory=list)
    visual: str = "none"
    expected_layers: int | None = None
    pass_seconds: float = 0.0
    compile_seconds: float = 0.0
    failure: str | None = None
    """Why the untouched graph was compiled instead, where a pass failed."""
    before: str | None = None
    after: str | None = None
    """Readable graphs, where a dump was asked for."""
    linears: dict[str, int] = field(default_factory=dict)
    """``before`` and ``after``: matmuls with a weight, counted in the graph that goes to the compiler."""
    linear_flops: dict[str, int] = field(default_factory=dict)
    """``before`` and ``after``: what those matmuls cost in one call, at the sizes that the graph was captured with."""
    frame: weakref.ReferenceType[nn.Module] | None = field(default=None, repr=False)
    """The module whose forward was captured: module paths of the sites start there."""
    calls: int = 0
    """How often the graph ran while a recorder was active."""


@dataclass
class Recorder:
    """Collects graph records and the visual positions seen while it is active."""

    graphs: list[GraphRecord] = field(default_factory=list)
    visual: list[Tensor] = field(default_factory=list)
    """Visual positions ``[batch, sequence]`` of each forward that had any, in order."""
    divisions: list[Division] = field(default_factory=list)
    """After each prompt under a plan that partitions, one for each graph that holds a part of the decoder; in order."""
    steps: list[DecodeStep] = field(default_factory=list)
    """Every call of such a graph that is a decode step, in order."""
    keep_graphs: bool = False
    _replaced: list[Tensor] = field(default_factory=list)

    def saw_visual(self, visual: Tensor, *same: Tensor | None) -> None:
        """Note the visual positions of a forward, once: they stand for the ``same`` that earlier graphs showed, or that
        were given."""
        replaced = [tensor for tensor in same if tensor is not None and tensor is not visual]
        self.visual = [visual if _among(v, replaced) else v for v in self.visual]
        if not _among(visual, [*self.visual, *self._replaced]):
            self.visual.append(visual)
        self._replaced += replaced


def _among(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    return any(tensor is other for other in others)


_active: ContextVar[Recorder | None] = ContextVar("avl_fx_recorder", default=None)


def active_recorder() -> Recorder | None:
    """The recorder of the `recording` block that is open, if any."""
    return _active.get()


def note_division(outcome: Division) -> None:
    """Remember what became of the cache of a prompt, where somebody is recording."""
    recorder = active_recorder()
    if recorder is not None:
        recorder.divisions.append(outcome)


@contextlib.contextmanager
def recording(keep_graphs: bool = False) -> Iterator[Recorder]:
    """Collect a record of every graph that the backend compiles inside the block."""
    recorder = Recorder(keep_graphs=keep_graphs)
    token = _active.set(recorder)
    try:
        yield recorder
    finally:
        _active.reset(token)
