"""What happens around a graph whose attention is partitioned: its extra inputs before, moved rows after.

A prompt starts (or restarts) the partition from its scores. A decode step reads what the state says and, when it was a
refresh, moves the rows of the keys that enter and leave core. A step whose cache has no valid state is dense; where the
visual positions are known all the same, its own rows start the partition (late start).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from avl_fx.kernels.partition import partition_
from avl_fx.modality import given
from avl_fx.partition import Partition, everything, find_partition
from avl_fx.passes.context import CachedTensor, PartitionedLayer, PartitionIO
from avl_fx.plan import Plan
from avl_fx.policies import TextPolicy, VisionPolicy

__all__ = ["PartitionRuntime"]

log = logging.getLogger("avl_fx")

EVERYTHING = VisionPolicy(core=1.0, secondary=1.0, refresh=0)
"""For plans that leave out text only."""


@dataclass(frozen=True)
class PartitionRuntime:
    """Serves the calls of one graph. Knows positions of inputs and outputs, and none of the graph's nodes."""

    policy: VisionPolicy
    text_policy: TextPolicy | None
    decode: bool
    layers: tuple[PartitionedLayer, ...]
    returned: int
    """Outputs beyond the model's own: the scores of each layer that owns keys, then as the next two say."""
    has_positions: bool
    has_last_mask: bool

    @classmethod
    def of(cls, plan: Plan, io: PartitionIO) -> PartitionRuntime:
        """The runtime of a graph that meets it as ``io`` says."""
        return cls(
            plan.vision_policy or EVERYTHING,
            None if plan.text_policy is None or plan.text_policy.is_identity else plan.text_policy,
            io.decode,
            tuple(replace(layer, weights=None) for layer in io.layers),
            len(io.returned()),
            io.positions is not None,
            io.last_mask is not None,
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
        return find_partition(before, self.policy, self.text_policy)

    def inputs(self, args: Sequence[Any], partition: Partition | None) -> tuple[Tensor, ...]:
        """``segments`` and ``weigh``, for a decode step."""
        if not self.decode:
            return ()
        first = next(args[c.before] for c in self._cached() if c.before is not None)
        if partition is None:
            return everything(first, weigh=given() is not None)
        return partition.segments, everything(first, weigh=partition.weighs)[1]

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
            returned: what `PartitionIO.returned` names, in that order.
            visual: visual positions ``[batch, sequence]`` of this forward, where known.
            partition: what `state` said before the call.
        """
        rest = list(returned)
        scores = {layer.layer: rest.pop(0) for layer in self.layers if layer.key is not None}
        positions = rest.pop(0) if self.has_positions else None
        last_mask = rest.pop(0) if self.has_last_mask else None
        keys = {layer.layer: self._after(args, outputs, layer.key) for layer in self.layers if layer.key is not None}
        if any(key.requires_grad for key in keys.values()):
            return  # training: nothing may be moved
        with torch.no_grad():
            if self.decode and partition is not None:
                self._step(partition, args, outputs, scores)
            else:
                length = next(iter(keys.values())).shape[2] if positions is None else int(positions[-1]) + 1
                seen = self._visual(length, visual, partition, batch=next(iter(keys.values())).shape[0])
                if seen is None or not _all_visible(seen, last_mask):
                    partition = None
                else:
                    partition = self._start(seen, last_mask, partition, args, outputs, keys, scores)
        if partition is not None:
            partition.generation += 1
            partition.attach(list(keys.values()))

    def _visual(self, length: int, visual: Tensor | None, before: Partition | None, batch: int) -> Tensor | None:
        """Visual key positions bool ``[batch, length]`` of the cache as it is now; ``None`` when nothing is known."""
        if self.decode:  # a late start: given positions are the prompt's, from the first key on
            visual, offset = given(), 0
        else:
            offset = length - (0 if visual is None else visual.shape[1])
        if visual is None and before is None:
            return None
        seen = torch.zeros(batch, length, dtype=torch.bool)
        if before is not None:
            seen[:, : before.visual.shape[1]] = before.visual[:, :length]
        if visual is not None:
            if visual.shape[0] != batch or offset < 0 or offset + visual.shape[1] > length:
                log.warning("visual positions %s do not fit a cache of %d keys", tuple(visual.shape), length)
                return None
            seen[:, offset : offset + visual.shape[1]] = visual.cpu()
        return seen

    def _start(
        self,
        visual: Tensor,
        last_mask: Tensor | None,
        before: Partition | None,
        args: Sequence[Any],
        outputs: Sequence[Any],
        keys: dict[int, Tensor],
        scores: dict[int, Tensor],
    ) -> Partition | None:
        visible = None if last_mask is None else _seen(last_mask, visual.shape[1])
        partition = Partition.start(self.policy, visual, self.text_policy, visible, before)
        if partition is None:
            return None
        partition.to(next(iter(keys.values())).device)
        for layer in self.layers:
            if layer.key is not None and not self.policy.is_identity:
                order = partition.first_order(layer.layer, scores[layer.layer])
                self._move(layer, order, args, outputs)
        self._forget(partition, args, outputs, scores, appended=False)
        return partition

    def _step(
        self,
        partition: Partition,
        args: Sequence[Any],
        outputs: Sequence[Any],
        scores: dict[int, Tensor],
    ) -> None:
        if partition.refreshes and not self.policy.is_identity:
            for layer in self.layers:
                if layer.key is not None:
                    order = partition.next_order(layer.layer, scores[layer.layer])
                    if order is not None:
                        self._move(layer, order, args, outputs)
        if partition.text is not None:
            partition.text.append(partition.length)
        partition.length += 1
        partition.step += 1
        self._forget(partition, args, outputs, scores, appended=True)

    def _forget(
        self,
        partition: Partition,
        args: Sequence[Any],
        outputs: Sequence[Any],
        scores: dict[int, Tensor],
        appended: bool,
    ) -> None:
        if partition.text is None:
            return
        for layer in self.layers:
            if layer.key is not None:
                order = partition.text.forget(layer.layer, scores[layer.layer], appended)
                if order is not None:
                    device = scores[layer.layer].device
                    self._move(layer, (order[0].to(device), order[1].to(device)), args, outputs)
        partition.text.settle(appended)

    def _move(
        self, anchor: PartitionedLayer, order: tuple[Tensor, Tensor], args: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        """Reorder the rows of ``anchor`` and of the lazy layers that read its keys."""
        source, slots = order
        for layer in self.layers:
            if layer.scores_from == anchor.layer:
                key = None if layer.key is None else self._after(args, outputs, layer.key)
                value = self._after(args, outputs, layer.value)
                partition_(key, value, source, slots)

    # ---- finding tensors -------------------------------------------------------------------------------------------

    def _cached(self) -> list[CachedTensor]:
        return [c for layer in self.layers for c in (layer.key, layer.value) if c is not None]

    @staticmethod
    def _after(args: Sequence[Any], outputs: Sequence[Any], tensor: CachedTensor) -> Tensor:
        if tensor.after is not None:
            return outputs[tensor.after]
        assert tensor.before is not None
        return args[tensor.before]


def _all_visible(visual: Tensor, last_mask: Tensor | None) -> bool:
    """Whether the prompt's last query sees every visual key: only then does their order not matter.

    Args:
        visual: bool ``[batch, keys]``.
        last_mask: ``[batch or 1, heads or 1, keys or more]``, boolean or additive; ``None``: it sees every key.
    """
    if last_mask is None:
        return True
    if bool((_seen(last_mask, visual.shape[1]) | ~visual).all()):
        return True
    log.warning("the attention mask hides visual keys: the cache is not partitioned and attention stays dense")
    return False


def _seen(last_mask: Tensor, keys: int) -> Tensor:
    """bool ``[batch or 1, keys]``: what the last query sees, through all heads."""
    seen = last_mask if last_mask.dtype == torch.bool else last_mask > torch.finfo(last_mask.dtype).min / 2
    return seen.all(1)[:, :keys].cpu()
