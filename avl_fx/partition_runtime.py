"""What happens around a graph whose attention is partitioned: its extra inputs before, moved rows after.

A prompt starts (or restarts) the partition from its scores. A decode step reads what the state says and, when it was a
refresh, moves the rows of the keys that enter and leave core. A step whose cache has no valid state is dense; where the
visual positions are known all the same, its own rows start the partition (late start).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from avl_fx.errors import CacheStateError
from avl_fx.growing import COMPACT_SPARE_ROWS, room, shorter
from avl_fx.kernels.last_mask import seen_keys, weighs_keys
from avl_fx.kernels.partition import partition_, partition_layers_
from avl_fx.modality import given, given_keys
from avl_fx.moves import Moves
from avl_fx.partition import Partition, everything, find_partition
from avl_fx.passes.context import CachedTensor, PartitionedLayer, PartitionIO
from avl_fx.plan import Plan
from avl_fx.policies import TextPolicy, VisionPolicy
from avl_fx.reads import PromptRow
from avl_fx.record import Undivided, note_division
from avl_fx.row_order import remember, sources
from avl_fx.scores import Scores

__all__ = ["PartitionRuntime"]

log = logging.getLogger("avl_fx")

EVERYTHING = VisionPolicy(core=1.0, secondary=1.0, refresh=0)
"""For plans that leave out text only, or nothing and inherit logits against visual keys."""

_names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight -> the name of its model: a cache, which is copied and pickled, cannot hold on to the weight itself."""


@dataclass(frozen=True)
class PartitionRuntime:
    """Serves the calls of one graph. Knows positions of inputs and outputs, and none of the graph's nodes."""

    policy: VisionPolicy
    text_policy: TextPolicy | None
    decode: bool
    compact: bool
    layers: tuple[PartitionedLayer, ...]
    returned: int
    """Outputs beyond the model's own: the scores of each layer that is scored, then as the next two say."""
    has_positions: bool
    has_last_mask: bool
    weight: int | None
    """Input with a weight of the model; one compiled graph may serve several models."""
    process_group: str | None = None
    """The group whose processes have the heads, some each."""
    filters: bool = False
    """Whether a prompt drops visual tokens on its way, where it is told that it may."""

    @classmethod
    def of(cls, plan: Plan, io: PartitionIO) -> PartitionRuntime:
        """The runtime of a graph that meets it as ``io`` says."""
        return cls(
            plan.vision_policy or EVERYTHING,
            plan.text_window,
            io.decode,
            io.compact,
            tuple(replace(layer, weights=None) for layer in io.layers),
            len(io.returned()),
            io.positions is not None,
            io.last_mask is not None,
            io.weight,
            io.process_group,
            io.left is not None,
        )

    # ---- before the call -------------------------------------------------------------------------------------------

    def state(self, args: Sequence[Any]) -> Partition | None:
        """The state of the cache that this call continues, if it is known."""
        keys = [layer.key for layer in self.layers if layer.key is not None]
        before = [args[key.before] for key in keys if key.before is not None]
        if len(before) != len(keys):
            return None
        # Inference tensors do not count their writes. Those of a dynamic cache are new at each step; of a static buffer
        # nobody can say whether somebody reset it.
        if any(key.after is None and tensor.is_inference() for key, tensor in zip(keys, before, strict=True)):
            return None
        found = find_partition(before, self.policy, self.text_policy)
        if found is None or found.model != self._model(args):
            return None
        buffers = [tensor for key, tensor in zip(keys, before, strict=True) if key.after is None]
        if any(found.length >= buffer.shape[2] for buffer in buffers):
            self._leave(found, args)
            return None
        return found

    def _leave(self, partition: Partition, args: Sequence[Any]) -> None:
        """A static buffer is full: what is written next replaces tokens by their place, so all go back to theirs."""
        for cached, layer in self._ordered():
            if cached.after is None and cached.before is not None:
                _enter_again(args[cached.before], partition, layer)

    def _model(self, args: Sequence[Any]) -> uuid.UUID | None:
        """The name of the model that calls; ``None`` where its weights are no inputs."""
        return None if self.weight is None else _names.setdefault(args[self.weight], uuid.uuid4())

    def inputs(self, args: Sequence[Any], partition: Partition | None) -> tuple[Tensor, ...]:
        """``segments`` and ``weigh``, for a decode step."""
        if not self.decode:
            return ()
        first = next(args[c.before] for c in self._cached() if c.before is not None)
        if partition is None:
            return everything(first, weigh=given() is not None)
        return partition.segments, everything(first, weigh=partition.weighs)[1]

    def may_drop(self, args: Sequence[Any], prompt: tuple[int, int] | None) -> tuple[Tensor, ...]:
        """Whether a prompt may drop visual tokens on its way, int32 ``[1]``: where its cache will be partitioned.

        Args:
            args: the graph's inputs.
            prompt: its batch size and length, where the graph is told its visual positions; ``None``: it knows them.
        """
        told, like = given(), next(x for x in args if isinstance(x, Tensor) and x.is_floating_point())
        # Of a prompt in pieces, the cache is partitioned when it is complete.
        whole = prompt is None or told is None or told.shape == prompt
        learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        return (torch.tensor([int(whole and not learns)], dtype=torch.int32, device=like.device),)

    def tokens(self, args: Sequence[Any], partition: Partition | None) -> int | None:
        """Tokens in the cache before this call; ``None`` where only the graph knows."""
        if partition is not None:
            return partition.length if partition.stored is None else partition.stored.length
        key = next(layer.key for layer in self.layers if layer.key is not None)
        if key.after is None:
            return None
        return 0 if key.before is None else args[key.before].shape[2]

    # ---- after the call --------------------------------------------------------------------------------------------

    def finish(
        self,
        args: Sequence[Any],
        outputs: list[Any],
        returned: Sequence[Tensor],
        visual: Tensor | None,
        partition: Partition | None,
    ) -> None:
        """Keep the cache partitioned.

        Args:
            args: the graph's inputs.
            outputs: the model's own outputs of the graph; those of a compact cache are replaced by what it stores.
            returned: what `PartitionIO.returned` names, in that order.
            visual: visual positions ``[batch, sequence]`` of this forward, where known.
            partition: what `state` said before the call.
        """
        rest = list(returned)
        scores = Scores({layer.layer: rest.pop(0) for layer in self.layers if layer.scored}, self.process_group)
        positions = rest.pop(0) if self.has_positions else None
        last_mask = rest.pop(0) if self.has_last_mask else None
        left = rest.pop(0) if self.filters else None
        keys = {layer.layer: self._after(args, outputs, layer.key) for layer in self.layers if layer.key is not None}
        if any(key.requires_grad for key in keys.values()):
            note_division(Undivided.TRAINING)
            return  # nothing may be moved; nor was anything dropped
        before = partition
        batch, _, length, _ = next(iter(keys.values())).shape
        dropped = left is not None and not (left.shape[1] == length and bool(left.all()))
        with torch.no_grad():
            if self.decode and partition is not None:
                if positions is not None and (partition.text is not None or positions.device.type == "cpu"):
                    partition = _rewound(partition, int(positions[-1]))
                partition = self._step(partition, last_mask, args, outputs, scores)
            elif not self.decode or given() is not None:
                queries = self._queries(args, length)
                if positions is not None:  # a static cache
                    length, queries = int(positions[-1]) + 1, len(positions)
                    if not len(positions) <= length <= min(key.shape[2] for key in keys.values()):
                        note_division(Undivided.MISFIT)  # a buffer that starts again at its end, or is a window
                        queries = None
                    elif before is not None:
                        # From the beginning nothing is left of what was there.
                        before = _rewound(before, length - queries) if length > queries else None
                seen = None if queries is None else self._visual(length, queries, visual, before, batch)
                if seen is None or not self._order_is_free(seen, last_mask):
                    partition = None
                else:
                    partition = self._start(seen, last_mask, before, args, outputs, keys, scores)
            if partition is None and dropped:
                raise CacheStateError(
                    "the prompt dropped visual tokens on its way (plan section 'prefill'), and then its cache could "
                    "not be partitioned: keys are missing",
                    field="cache",
                    remedy="leave 'prefill' out of the plan for such prompts, and start again with a fresh cache",
                )
            if partition is None and before is not None:
                if before.stored is not None:
                    raise CacheStateError(
                        "the new prompt's mask hides visual keys of a compact cache, or splits it into too many "
                        "ranges, and what the cache left out cannot be brought back",
                        field="cache",
                        remedy="use a stock cache for this conversation",
                    )
                self._put_back(before, args, outputs)
        if partition is not None:
            partition.generation += 1
            partition.attach([self._after(args, outputs, layer.key) for layer in self.layers if layer.key is not None])
            if not self.compact:
                for tensor, layer in self._dynamic(args, outputs):
                    remember(tensor, partition, layer)

    def _order_is_free(self, visual: Tensor, last_mask: Tensor | None) -> bool:
        """Whether it makes no difference to a mask where rows lie: it shows all visual keys, and hides or shows others.

        Args:
            visual: bool ``[batch, keys]``.
            last_mask: the last query's, ``[batch or 1, heads or 1, keys or more]``, boolean or additive; ``None``: it
                sees every key.
        """
        if last_mask is None:
            return True
        moves = not self.policy.is_identity or self.text_policy is not None
        found = None
        if not bool((_seen(last_mask, visual.shape[1]) | ~visual).all()):
            found = Undivided.HIDDEN
        elif moves and weighs_keys(last_mask, visual.shape[1]):
            found = Undivided.BIASED
        if found is None:
            return True
        if not self.decode:  # a late start is asked for at every step until the answer is yes
            log.warning("%s: the cache is not partitioned and attention stays dense", found)
        note_division(found)
        return False

    def _queries(self, args: Sequence[Any], length: int) -> int | None:
        """How many of the ``length`` keys of a dynamic cache are this forward's; ``None`` for a static cache."""
        key = next(layer.key for layer in self.layers if layer.key is not None)
        if key.after is None:
            return None
        return length if key.before is None else length - args[key.before].shape[2]

    def _visual(
        self, length: int, queries: int, visual: Tensor | None, before: Partition | None, batch: int
    ) -> Tensor | None:
        """Visual key positions bool ``[batch, length]`` of the cache as it is now; ``None`` when nothing is known.

        The last ``queries`` keys are this forward's. Where nothing is known of earlier ones they count as text.
        """
        if self.decode:  # a late start: the prompt ran elsewhere, or its cache was copied since
            visual, first = given(), given_keys(0, length)
        elif visual is not None and visual is given():
            first = given_keys(queries, length)
        else:
            first = length - queries if visual is not None and visual.shape[1] == queries else None
        if before is not None and before.stored is not None and first is not None and first < before.stored.count:
            first = None  # said before, of a compact cache that stores other rows now
        fits = visual is not None and first is not None and visual.shape[0] == batch
        if not fits and before is None:
            if not self.decode:
                note_division(Undivided.UNKNOWN if visual is None else Undivided.MISFIT)
            if visual is not None and not self.decode:
                # A prompt in pieces does not hold all of them yet.
                level = logging.INFO if visual.shape[1] > length else logging.WARNING
                log.log(level, "visual positions %s do not fit %d of %d keys", tuple(visual.shape), queries, length)
            return None
        seen = torch.zeros(batch, length, dtype=torch.bool, device="cpu")
        if before is not None:
            seen[:, : before.visual.shape[1]] = before.visual[:, :length]
        if fits:
            assert visual is not None
            assert first is not None
            seen[:, first : first + visual.shape[1]] = visual.cpu()
        return seen

    def _start(
        self,
        visual: Tensor,
        last_mask: Tensor | None,
        before: Partition | None,
        args: Sequence[Any],
        outputs: list[Any],
        keys: dict[int, Tensor],
        scores: Scores,
    ) -> Partition | None:
        visible = None if last_mask is None else _seen(last_mask, visual.shape[1])
        stored, old = None, 0
        if before is not None and before.stored is not None:
            old = before.stored.count
            stored = before.stored.extended(visual.shape[1] - old, visual[:, old:].sum(1).tolist())
        partition = Partition.start(self.policy, visual, self.text_policy, visible, before, stored)
        if partition is None:
            return None
        note_division(_counted(partition))
        partition.model = self._model(args)
        partition.to(next(iter(keys.values())).device)
        if not self.policy.is_identity:
            for moves in partition.first_moves(scores.by(self.policy.scores)):
                self._move(moves, args, outputs)
        self._forget(partition, args, outputs, scores, appended=False)
        # A later turn of text alone may still be taken back: assisted decoding does.
        only_text = stored is not None and partition.text is None and not visual[:, old:].any()
        if not only_text:
            return self._pack(partition, visible, outputs)
        self._leave_out_keys(partition, outputs)
        return partition

    def _pack(self, partition: Partition, visible: Tensor | None, outputs: list[Any]) -> Partition:
        """Let a compact cache go of what is never read again, as soon as that makes it shorter.

        Args:
            partition: the state after this call.
            visible: bool ``[batch, keys]``, without padding; ``None``: all of them.
            outputs: the model's own outputs of the graph; receives what is stored.
        """
        if not self.compact:
            return partition
        packed, source = partition.pack(visible)
        if not self.decode and any(layer.keyless for layer in self.layers):
            packed.leave_out_keys()
        assert packed.stored is not None
        if partition.stored is None and packed.length == partition.length and not packed.stored.keyless:
            return partition
        owned = source.gather(1, packed.owned_rows) if packed.stored.keyless else source
        for position, keyless in self._positions():
            outputs[position] = _taken(outputs[position], owned if keyless else source)
        return packed

    def _leave_out_keys(self, partition: Partition, outputs: list[Any]) -> None:
        """A prompt's graph returns all keys of lazy layers, also those that the cache has left out before."""
        if partition.stored is not None and partition.stored.keyless:
            owned = partition.owned_rows
            for position, keyless in self._positions():
                if keyless:
                    outputs[position] = _taken(outputs[position], owned)

    def _positions(self) -> list[tuple[int, bool]]:
        """Where the graph returns the tensors of a growing cache; and whether they are keys that lack visual rows."""
        return [
            (tensor.after, layer.keyless and tensor is layer.key)
            for layer in self.layers
            for tensor in layer.cached
            if tensor.after is not None
        ]

    def _step(
        self,
        partition: Partition,
        last_mask: Tensor | None,
        args: Sequence[Any],
        outputs: list[Any],
        scores: Scores,
    ) -> Partition:
        if partition.refreshes and not self.policy.is_identity:
            for moves in partition.next_moves(scores.by(self.policy.scores)):
                self._move(moves, args, outputs, partition, text=False)
        stored = partition.stored
        if partition.text is not None:
            partition.text.append(partition.length, None if stored is None else stored.length)
        partition.length += 1
        partition.step += 1
        self._forget(partition, args, outputs, scores, appended=True)
        if stored is not None and partition.text is None:
            stored.append()
        elif stored is not None:
            self._let_go(partition, args, outputs)
        elif self.compact and partition.text is not None and partition.text.leaves_out:
            visible = None if last_mask is None else _seen(last_mask, partition.length)
            return self._pack(partition, visible, outputs)
        return partition

    def _let_go(self, partition: Partition, args: Sequence[Any], outputs: list[Any]) -> None:
        """A compact cache stores no row that the step drove out."""
        order = partition.close_ranks()
        if order is not None:
            self._move(Moves.alike(self._deciding(), order), args, outputs, partition)
        assert partition.stored is not None
        for position, keyless in self._positions():
            left_out = partition.stored.keyless if keyless else 0
            outputs[position] = shorter(outputs[position], partition.length - left_out)

    def _forget(
        self,
        partition: Partition,
        args: Sequence[Any],
        outputs: Sequence[Any],
        scores: Scores,
        appended: bool,
    ) -> None:
        if partition.text is None:
            return
        for layer in self._deciding():
            rows = scores.shared[layer]
            order = partition.text.forget(layer, rows, appended)
            if order is not None:
                device = rows.device
                order = order[0].to(device), order[1].to(device)
                self._move(Moves.of(layer, order), args, outputs, partition if self.decode else None)
        partition.text.settle(appended)

    def _move(
        self,
        moves: Moves,
        args: Sequence[Any],
        outputs: Sequence[Any],
        partition: Partition | None = None,
        text: bool = True,
    ) -> None:
        """Reorder the rows of the layers that decide and of the lazy layers that follow them.

        Args:
            moves: what the deciding layers want.
            args: the graph's inputs.
            outputs: the model's own outputs of the graph.
            partition: the state where keys of lazy layers may lack visual rows; ``None``: they have all of them.
            text: whether rows of text move.
        """
        orders = {layer: number for number, layer in enumerate(moves.layers)}
        fewer: dict[int, tuple[Tensor, Tensor]] = {}
        caches = []
        for layer in self.layers:
            order = orders.get(layer.scores_from)
            if order is not None and layer.value is not None:
                key = None if layer.key is None else self._after(args, outputs, layer.key)
                value = self._after(args, outputs, layer.value)
                if layer.keyless and partition is not None and partition.lacks_keys:
                    if text:
                        if order not in fewer:
                            fewer[order] = partition.moved_keys(moves.order(order))
                        partition_(key, None, *fewer[order])
                    key = None
                caches.append((key, value, order))
        partition_layers_(caches, moves.source, moves.slots)

    def _put_back(self, partition: Partition, args: Sequence[Any], outputs: Sequence[Any]) -> None:
        """The partition ends: no crop may find a row elsewhere than it entered."""
        for tensor, layer in self._dynamic(args, outputs):
            _enter_again(tensor, partition, layer)

    # ---- finding tensors -------------------------------------------------------------------------------------------

    def _deciding(self) -> list[int]:
        """The layers that decide which keys matter."""
        return [layer.layer for layer in self.layers if layer.decides]

    def _ordered(self) -> list[tuple[CachedTensor, int]]:
        """Keys and values, each with the layer that decides their order."""
        return [(cached, layer.scores_from) for layer in self.layers for cached in layer.cached]

    def _cached(self) -> list[CachedTensor]:
        return [cached for cached, _ in self._ordered()]

    def _dynamic(self, args: Sequence[Any], outputs: Sequence[Any]) -> list[tuple[Tensor, int]]:
        """Keys and values of dynamic caches after a call, each with the layer that decides their order."""
        ordered = self._ordered()
        return [(self._after(args, outputs, cached), layer) for cached, layer in ordered if cached.after is not None]

    @staticmethod
    def _after(args: Sequence[Any], outputs: Sequence[Any], tensor: CachedTensor) -> Tensor:
        if tensor.after is not None:
            return outputs[tensor.after]
        assert tensor.before is not None
        return args[tensor.before]


def _rewound(partition: Partition, start: int) -> Partition:
    """The state of a static cache that a call wrote to from position ``start`` on.

    Raises:
        CacheStateError: rows have moved there, so that the call wrote over other tokens than it meant to.
    """
    if start >= partition.length:
        return partition
    visual = partition.visual.any(0).nonzero().flatten()
    if partition.text is None and start > int(visual.max()):
        return replace(partition, visual=partition.visual[:, :start], length=start)
    raise CacheStateError(
        f"a static cache of {partition.length} tokens was written to from position {start} on, where a partition had "
        "moved rows of other tokens: these are lost",
        field="cache",
        remedy="start again from the prompt; to take tokens back use a DynamicCache, or a plan without a text window",
    )


def _enter_again(rows: Tensor, partition: Partition, layer: int) -> None:
    """Put ``rows`` ``[batch, kv_heads, keys, dim]`` of ``layer``, which ``partition`` moved, back to their place."""
    source = sources(partition, layer, rows.shape[2])
    if source is not None:
        slots = torch.arange(rows.shape[2], device=rows.device).expand(len(rows), -1)
        partition_(rows, None, source.to(rows.device), slots)


def _taken(rows: Tensor, source: Tensor) -> Tensor:
    """``rows`` ``[batch, kv_heads, keys, dim]`` at ``source`` int64 ``[batch, kept]``, zeros where that is -1."""
    kept = room(rows, source.shape[1], spare=COMPACT_SPARE_ROWS)
    for number, index in enumerate(source):
        there = index[index >= 0]
        kept[number, :, : len(there)] = rows[number].index_select(1, there.to(rows.device))
        kept[number, :, len(there) :] = 0
    return kept


def _counted(partition: Partition) -> tuple[PromptRow, ...]:
    """What figures need to know of a partition that starts."""
    visual = partition.visual.sum(1).tolist()
    text = [0] * len(visual) if partition.text is None else partition.text.counts
    return tuple(map(PromptRow, visual, text))


def _seen(last_mask: Tensor, keys: int) -> Tensor:
    """bool ``[batch or 1, keys]`` on the CPU: what the last query sees, through all heads."""
    return seen_keys(last_mask, keys).cpu()
