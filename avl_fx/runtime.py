"""The callable that Dynamo gets back: the compiled graph, and what has to happen around it outside the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from avl_fx.dropped_keys import check_stored, mark_buffer, marker
from avl_fx.modality import attach, carried, given
from avl_fx.partition_runtime import PartitionRuntime
from avl_fx.passes.context import DroppedKeys
from avl_fx.record import GraphRecord, active_recorder

__all__ = ["CompiledGraph"]


@dataclass(frozen=True)
class CompiledGraph:
    """Runs one compiled graph.

    Before it: refuses key caches that a lazy plan left empty where this graph attends densely. After it: puts the
    markers of dropped keys where the model expects keys, lets discovered visual positions ride on the outputs, and
    keeps partitioned caches in order.
    """

    compiled: Callable[..., Any]
    dense_keys: Sequence[tuple[int, int | None]]
    """``(input position, layer)`` of the key caches that this graph reads densely."""
    dropped: Sequence[DroppedKeys]
    """In ascending order of output position."""
    returns_visual: bool
    record: GraphRecord
    partition: PartitionRuntime | None = None

    def __call__(self, *args: Any) -> Any:
        for position, layer in self.dense_keys:
            check_stored(args[position], layer)
        for drop in self.dropped:
            if drop.placeholder is not None:
                mark_buffer(args[drop.placeholder])
        if self.partition is None:
            outputs = list(self.compiled(*args))
            visual = outputs.pop() if self.returns_visual else None
            self._restore(outputs)
            self._pass_on(args, outputs, visual)
            return outputs
        state = self.partition.state(args)
        outputs = list(self.compiled(*args, *self.partition.inputs(args, state)))
        returned = [outputs.pop() for _ in range(self.partition.returned)][::-1]
        visual = outputs.pop() if self.returns_visual else None
        self._restore(outputs)
        visual = self._pass_on(args, outputs, visual)
        self.partition.finish(args, outputs, returned, visual, state)
        return outputs

    def _restore(self, outputs: list[Any]) -> None:
        functional = [d for d in self.dropped if d.output is not None and d.like_output is not None]
        for drop in functional:
            outputs.insert(drop.output, None)  # type: ignore[arg-type]
        for drop in functional:
            outputs[drop.output] = marker(outputs[drop.like_output], drop.head_dim)  # type: ignore[index]
        for drop in self.dropped:
            if drop.output is not None and drop.like_output is None:
                mark_buffer(outputs[drop.output])

    def _pass_on(self, args: Sequence[Any], outputs: list[Any], visual: Tensor | None) -> Tensor | None:
        """Let visual positions ride on; returns those of this forward where they are known."""
        recorder = active_recorder()
        if visual is None:
            visual = carried(args) if self.record.visual != "none" or recorder is not None else None
        if visual is not None:
            attach(outputs, visual)
        if recorder is not None:
            self.record.calls += 1
            seen = visual if visual is not None else given()
            if seen is not None and self.record.visual != "none":
                recorder.saw_visual(seen)
        return visual if visual is not None else given()
