"""What happens around a graph whose attention is partitioned: its extra inputs before, moved rows after.

A prompt starts (or restarts) the partition from its scores. A decode step reads what the state says and, when it was a
refresh, moves the rows of the keys that enter and leave core. A step whose cache has no valid state is dense; where the
visual positions are known all the same, its own rows start the partition (late start).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avl_fx.kernels.partition import partition_
from avl_fx.modality import given
from avl_fx.partition import Partition, dense_segments, find_partition
from avl_fx.passes.context import CachedTensor, PartitionedLayer, PartitionIO
from avl_fx.policies import VisionPolicy

__all__ = ["PartitionRuntime"]


@dataclass(frozen=True)
class PartitionRuntime:
    """Serves the calls of one graph."""

    policy: VisionPolicy
    io: PartitionIO

    # ---- before the call -------------------------------------------------------------------------------------------

    def state(self, args: Sequence[Any]) -> Partition | None:
        """The state of the cache that this call continues, if it is known."""
        keys = [layer.key for layer in self.io.layers if layer.key is not None]
        before = [args[key.before] for key in keys if key.before is not None]
        if len(before) != len(keys) or any(k.after is None and t.is_inference() for k, t in zip(keys, before)):
            return None
        return find_partition(before, self.policy)

    def inputs(self, args: Sequence[Any], partition: Partition | None) -> tuple[Tensor, ...]:
        """``segments`` and ``weigh``, for a decode step."""
        if not self.io.decode:
            return ()
        first = next(args[c.before] for c in self._cached() if c.before is not None)
        if partition is not None:
            segments, weigh = partition.segments, partition.refreshes
        else:
            segments, weigh = dense_segments(first.shape[0], first.device), given() is not None
        return segments, torch.tensor([int(weigh)], dtype=torch.int32, device=first.device)

    # ---- after the call --------------------------------------------------------------------------------------------

    def finish(
        self,
        args: Sequence[Any],
        outputs: Sequence[Any],
        returned: Sequence[Tensor],
        visual: Tensor | None,
        partition: Partition | None,
    ) -> None:
        """Keep the cache partitioned.

        Args:
            args: the graph's inputs.
            outputs: the model's own outputs of the graph.
            returned: what `PartitionIO.returned` names.
            visual: visual positions ``[batch, sequence]`` of this forward, where known.
            partition: what `state` said before the call.
        """
        scores = {layer.layer: row for layer, row in zip(self._scored(), returned, strict=False)}
        keys = {
            layer.layer: self._after(args, outputs, layer.key) for layer in self.io.layers if layer.key is not None
        }
        if any(key.requires_grad for key in keys.values()):
            return  # training: nothing may be moved
        with torch.no_grad():
            if self.io.decode and partition is not None:
                self._step(partition, args, outputs, keys, scores)
            else:
                positions = returned[-1] if self.io.positions is not None else None
                partition = self._start(args, outputs, keys, scores, positions, visual, partition)
        if partition is not None:
            partition.generation += 1
            partition.attach(list(keys.values()))

    def _start(
        self,
        args: Sequence[Any],
        outputs: Sequence[Any],
        keys: dict[int, Tensor],
        scores: dict[int, Tensor],
        positions: Tensor | None,
        visual: Tensor | None,
        before: Partition | None,
    ) -> Partition | None:
        first = next(iter(keys.values()))
        length = first.shape[2] if positions is None else int(positions[-1]) + 1
        if self.io.decode:  # a late start: positions are the prompt's
            visual = given()
            offset = 0
        else:
            queries = 0 if visual is None else visual.shape[1]
            offset = length - queries
        if visual is None and before is None:
            return None
        everything = torch.zeros(first.shape[0], length, dtype=torch.bool)
        if before is not None:
            everything[:, : before.visual.shape[1]] = before.visual[:, :length]
        if visual is not None:
            if visual.shape[0] != first.shape[0] or offset < 0 or offset + visual.shape[1] > length:
                return None
            everything[:, offset : offset + visual.shape[1]] = visual.cpu()
        partition = Partition.start(self.policy, everything, length)
        if partition is None:
            return None
        partition.to(first.device)
        for layer in self.io.layers:
            if layer.key is not None:
                order = partition.first_order(layer.layer, scores[layer.layer])
                self._move(layer, order, args, outputs)
        return partition

    def _step(
        self,
        partition: Partition,
        args: Sequence[Any],
        outputs: Sequence[Any],
        keys: dict[int, Tensor],
        scores: dict[int, Tensor],
    ) -> None:
        if partition.refreshes:
            for layer in self.io.layers:
                if layer.key is not None:
                    order = partition.next_order(layer.layer, scores[layer.layer])
                    if order is not None:
                        self._move(layer, order, args, outputs)
        partition.step += 1
        partition.length += 1

    def _move(
        self, anchor: PartitionedLayer, order: tuple[Tensor, Tensor], args: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        """Reorder the rows of ``anchor`` and of the lazy layers that read its keys."""
        source, slots = order
        for layer in self.io.layers:
            if layer.scores_from == anchor.layer:
                key = None if layer.key is None else self._after(args, outputs, layer.key)
                value = self._after(args, outputs, layer.value)
                partition_(key, value, source, slots)

    # ---- finding tensors -------------------------------------------------------------------------------------------

    def _scored(self) -> list[PartitionedLayer]:
        return [layer for layer in self.io.layers if layer.weights is not None]

    def _cached(self) -> list[CachedTensor]:
        return [c for layer in self.io.layers for c in (layer.key, layer.value) if c is not None]

    @staticmethod
    def _after(args: Sequence[Any], outputs: Sequence[Any], tensor: CachedTensor) -> Tensor:
        if tensor.after is not None:
            return outputs[tensor.after]
        assert tensor.before is not None
        return args[tensor.before]
