"""The callable that Dynamo gets back: the compiled graph, and what has to happen around it outside the graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from avl_fx import modality, partition, row_order
from avl_fx.compact_calls import CompactCalls
from avl_fx.dropped_keys import Nans, check_stored, mark_buffer, marker
from avl_fx.growing import GrowingCache
from avl_fx.modality import attach, carried, given, mark_audio_mask
from avl_fx.observe import ObservedGraph
from avl_fx.partition import Partition, everything
from avl_fx.partition_runtime import PartitionRuntime
from avl_fx.passes.context import DroppedKeys, PassContext
from avl_fx.passes.share_queries import decoder_sites
from avl_fx.record import DecodeStep, GraphRecord, active_recorder
from avl_fx.row_order import as_entered
from avl_fx.visual_calls import VisualCalls

__all__ = ["CompiledGraph", "calls", "decoder_calls"]

_calls, _decoder_calls = itertools.count(), itertools.count()


def calls() -> int:
    """A number that grows with every call of a compiled graph."""
    return next(_calls)


def decoder_calls() -> int:
    """The same of graphs that show attention of decoder layers."""
    return next(_decoder_calls)


@dataclass(frozen=True)
class CompiledGraph:
    """Runs one compiled graph.

    Before it: refuses key caches that a lazy plan left empty where this graph attends densely, and puts the rows of a
    partitioned cache back unless this graph continues the partition. After it: puts the
    markers of dropped keys where the model expects keys, lets discovered visual positions ride on the outputs, keeps
    partitioned caches in order, and hands what was observed to whoever calibrates.
    """

    compiled: Callable[..., Any]
    dense_keys: Sequence[tuple[int, int | None]]
    """``(input position, layer)`` of the key caches that this graph reads densely."""
    dropped: Sequence[DroppedKeys]
    returns_visual: bool
    record: GraphRecord
    emptied: Sequence[int] = ()
    """Output positions, ascending, where the graph returns nothing."""
    growing: GrowingCache | None = None
    compact: CompactCalls | None = None
    partition: PartitionRuntime | None = None
    takes_ranges: bool = False
    visual: VisualCalls | None = None
    past: Sequence[int] = ()
    """Input positions of the keys and values of dynamic caches."""
    hidden: Sequence[int] = ()
    """Input positions of what looks like hidden states: visual positions may ride there."""
    returns_the_same: bool = False
    """Whether it may return the tensors of an earlier call (CUDA graphs)."""
    audio_masks: Sequence[int] = ()
    """Output positions of masks of audio."""
    observed: ObservedGraph | None = None
    decodes: bool = False
    """Whether it shows attention of decoder layers, which a plan is about."""

    @classmethod
    def of(
        cls,
        compiled: Callable[..., Any],
        ctx: PassContext,
        record: GraphRecord,
        dense_keys: Sequence[tuple[int, int | None]] = (),
        past: Sequence[int] = (),
        hidden: Sequence[int] = (),
    ) -> CompiledGraph:
        """What runs ``compiled`` as the passes left word in ``ctx``."""
        growing, partition = None, None
        if ctx.growing or ctx.reserve or ctx.adopt:
            growing = GrowingCache(ctx.growing, ctx.reserve, ctx.adopt)
        if ctx.partition is not None:
            partition = PartitionRuntime.of(ctx.plan, ctx.partition)
        return cls(
            compiled,
            dense_keys,
            dropped=tuple(ctx.dropped_keys),
            returns_visual=ctx.visual is not None and ctx.visual.node is not None,
            record=record,
            emptied=ctx.emptied(),
            growing=growing,
            compact=None if ctx.compact is None else CompactCalls.of(ctx.compact),
            partition=partition,
            takes_ranges=ctx.ranges is not None,
            visual=None if ctx.visual_inputs is None else VisualCalls.of(ctx.visual_inputs),
            past=past,
            hidden=hidden,
            returns_the_same=not ctx.spare_rows,
            audio_masks=ctx.returned_audio_masks,
            observed=None if ctx.observed is None else ObservedGraph.of(ctx.observed, record),
            decodes=bool(decoder_sites(ctx)),
        )

    def __call__(self, *given_args: Any) -> Any:
        next(_calls)
        if self.decodes:
            next(_decoder_calls)
        args: Sequence[Any] = given_args
        for position, layer in self.dense_keys:
            check_stored(args[position], layer)
        for drop in self.dropped:
            if drop.placeholder is not None:
                mark_buffer(args[drop.placeholder])
        state = None if self.partition is None else self.partition.state(args)
        columns = () if self.compact is None else self.compact.inputs(args, state)
        if state is None:
            args = as_entered(args, self.past)
        ranges = self._ranges(args, state)
        inputs = args if self.growing is None else self.growing.before(args)
        new, past = self._visual_ranges(args, state)
        outputs = list(self.compiled(*inputs, *columns, *new, *ranges, *past, *self._may_drop(args)))
        if self.returns_the_same:
            _let_nothing_ride(outputs, inputs)
        rows = _taken_off(outputs, 0 if self.observed is None else self.observed.returned)
        returned = _taken_off(outputs, 0 if self.partition is None else self.partition.returned)
        visual = outputs.pop() if self.returns_visual else None
        if visual is not None and self.returns_the_same:
            visual = visual.clone()  # it rides on, and the next call writes over it
        for position in self.emptied:
            outputs.insert(position, None)
        if self.growing is not None:
            self.growing.after(inputs, outputs)
        for position in self.audio_masks:
            mark_audio_mask(outputs[position])
        visual = self._pass_on(args, outputs, visual)
        if self.observed is not None:
            self.observed.finish(rows, visual)
        if self.partition is not None:
            self.partition.finish(inputs, outputs, returned, visual, state)
        self._mark_dropped(outputs)
        return outputs

    def _ranges(self, args: Sequence[Any], state: Partition | None) -> tuple[Tensor, ...]:
        """What the graph is to read: everything, unless its cache is partitioned."""
        if not self.takes_ranges:
            return ()
        if self.partition is not None:
            recorder = active_recorder()
            if recorder is not None:
                recorder.steps.append(_step(self.record.index, state))
            return self.partition.inputs(args, state)
        assert self.growing is not None
        return everything(args[self.growing.tensors[0].before])

    def _visual_ranges(
        self, args: Sequence[Any], state: Partition | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Which positions are visual, where the graph asks: of this forward, and of the cache before it."""
        if self.visual is None:
            return (), ()
        if self.partition is not None:
            tokens = self.partition.tokens(args, state)
        else:
            tokens = args[self.past[0]].shape[2] if self.past else None
        return self.visual.new(args, tokens, self._carried(args)), self.visual.past(args, state)

    def _may_drop(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """Whether a prompt may drop tokens on its way, where the graph asks."""
        if self.partition is None or not self.partition.filters:
            return ()
        return self.partition.may_drop(args, None if self.visual is None else self.visual.sizes(args))

    def _carried(self, args: Sequence[Any]) -> Tensor | None:
        # Asked at every step: most inputs are weights.
        return carried(args[position] for position in self.hidden)

    def _mark_dropped(self, outputs: list[Any]) -> None:
        shared: Nans = {}
        for drop in self.dropped:
            if drop.output is None:
                continue
            if drop.like_output is None:
                mark_buffer(outputs[drop.output])
            else:
                outputs[drop.output] = marker(outputs[drop.like_output], drop.head_dim, shared, drop.dtype)

    def _pass_on(self, args: Sequence[Any], outputs: list[Any], visual: Tensor | None) -> Tensor | None:
        """Let visual positions ride on; returns those of this forward where they are known."""
        recorder = active_recorder()
        earlier = self._carried(args)
        if visual is None:
            visual = earlier
        elif earlier is not None and earlier.shape == visual.shape:
            visual = visual | earlier.to(visual.device)  # images in one graph, videos in the next
        if visual is not None:
            attach(outputs, visual)
        if recorder is not None:
            self.record.calls += 1
            seen = visual if visual is not None else given()
            if seen is not None and self.record.visual != "none":
                recorder.saw_visual(seen, earlier, given())
        return visual if visual is not None else given()


def _taken_off(outputs: list[Any], count: int) -> list[Any]:
    """The last ``count`` outputs, which are taken off the others."""
    return [outputs.pop() for _ in range(count)][::-1]


def _let_nothing_ride(outputs: Sequence[Any], inputs: Sequence[Any]) -> None:
    """What rode on ``outputs`` in an earlier call is no news of this one."""
    given_in = {id(tensor) for tensor in inputs}
    for tensor in outputs:
        if isinstance(tensor, Tensor) and vars(tensor) and id(tensor) not in given_in:
            modality.detach(tensor)
            partition.detach(tensor)
            row_order.detach(tensor)


def _step(graph: int, state: Partition | None) -> DecodeStep:
    if state is None:
        return DecodeStep(graph, "all")
    tokens = state.length if state.stored is None else state.stored.length
    return DecodeStep(graph, "secondary" if state.reads_secondary else "core", state.step + 1, tokens + 1)
