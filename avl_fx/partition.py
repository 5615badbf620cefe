"""The state of a partitioned cache: which rows hold core, secondary and minor visual keys (A-VL, arXiv 2409.14846).

Attention over keys that are all visible does not depend on their order, and RoPE is already in the keys. So the visual
rows of a stock cache are reordered inside their own positions, core first, then secondary, then minor; text stays where
it is. The cache remains complete: dense attention over it still gives the exact answer.

All layers of a cache have the same layout, one `Partition`; what differs is which visual token lies in which row. It
rides on the key tensors, with a generation number and the tensors' versions: a cache that was copied, cropped,
reordered or written by somebody else has no valid state, and is attended to densely.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from avl_fx.kernels.partition.native import reselect_native
from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from avl_fx.policies import TextPolicy, VisionPolicy
from avl_fx.text_window import TextWindow

__all__ = ["Partition", "everything", "find_partition"]

log = logging.getLogger("avl_fx")

_ATTRIBUTE = "_avl_partition"
_END = 2**40
"""A segment of this length reaches the end of the cache, however long it grows."""

Ranges = list[list[tuple[int, int]]]
"""For each batch row, starts and ends in ascending order."""


def everything(like: Tensor, weigh: bool = False) -> tuple[Tensor, Tensor]:
    """The inputs of a decode graph that let it read every key of ``like`` ``[batch, kv_heads, keys, dim]``.

    Returns:
        Key ranges int64 ``[batch, MAX_SEGMENTS, 2]`` and whether softmax rows are wanted, int32 ``[1]``.
    """
    return _everything(like.shape[0], like.device, weigh)


@lru_cache(maxsize=64)
def _everything(batch: int, device: torch.device, weigh: bool) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept for later calls, which may run in any mode
        segments = torch.zeros(batch, MAX_SEGMENTS, 2, dtype=torch.int64)
        segments[:, 0, 1] = _END
        return segments.to(device), torch.tensor([int(weigh)], dtype=torch.int32, device=device)


@dataclass
class Partition:
    """Layout of one cache, and the order of the visual tokens in each of its layers.

    Shapes: B batch rows, N the most visual tokens of any row, G 1 (shared scores) or the number of KV heads.
    """

    policy: VisionPolicy
    visual: Tensor
    """bool ``[B, prompt]``: visual key positions."""
    slots: Tensor
    """int64 ``[B, N]``: visual key positions in ascending order; ``-1`` beyond a row's own."""
    core: Tensor
    """int64 ``[B]``: rows of core, the first so many slots."""
    secondary: Tensor
    """int64 ``[B]``"""
    core_ranges: Ranges
    """Everything but the visual rows beyond core."""
    secondary_ranges: Ranges
    core_runs: Ranges
    """The visual rows of core."""
    secondary_runs: Ranges
    core_segments: Tensor
    secondary_segments: Tensor
    length: int
    """Keys in the cache."""
    text: TextWindow | None = None
    """``None``: all text is read."""
    step: int = 0
    """Decode steps since the last prompt."""
    generation: int = 0
    """Calls so far: older key tensors of this cache are out of date."""
    tokens: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> int64 ``[B, G, N]``: which visual token of the row lies in which slot."""

    @classmethod
    def start(
        cls,
        policy: VisionPolicy,
        visual: Tensor,
        text_policy: TextPolicy | None = None,
        visible: Tensor | None = None,
        before: Partition | None = None,
    ) -> Partition | None:
        """The layout after a prompt.

        Args:
            policy: the plan's.
            visual: bool ``[B, keys]``, of the whole cache.
            text_policy: the plan's; ``None``: all text is read.
            visible: bool ``[B, keys]``, without padding; ``None``: all of them.
            before: the state that the cache had until now.

        Returns:
            ``None`` without visual keys, or with too many spans of them.
        """
        visual = visual.to("cpu")
        counts = visual.sum(1)
        most = int(counts.max()) if len(counts) else 0
        if most == 0:
            return None
        slots = torch.full((len(visual), most), -1, dtype=torch.int64)
        for row, flags in enumerate(visual):
            slots[row, : counts[row]] = flags.nonzero().flatten()
        core = torch.tensor([int(policy.core * int(n)) for n in counts], dtype=torch.int64)
        secondary = torch.tensor([int(policy.secondary * int(n)) for n in counts], dtype=torch.int64)
        core_ranges, secondary_ranges = _ranges(slots, core), _ranges(slots, secondary)
        core_runs, secondary_runs = _runs(slots, core), _runs(slots, secondary)
        most_ranges = max(map(len, core_ranges + secondary_ranges))
        if text_policy is not None:  # a cut may fall anywhere, and what is new stands behind the last key
            most_ranges += max(map(len, core_runs + secondary_runs)) + 1
        if most_ranges > MAX_SEGMENTS:
            log.warning("more than %d ranges of keys to read in a row: attention stays dense", MAX_SEGMENTS)
            return None
        text = None
        if text_policy is not None:
            text = TextWindow.start(text_policy, visual, visible, None if before is None else before.text)
        return cls(
            policy,
            visual,
            slots,
            core,
            secondary,
            core_ranges,
            secondary_ranges,
            core_runs,
            secondary_runs,
            _segments(core_ranges),
            _segments(secondary_ranges),
            visual.shape[1],
            text,
        )

    def to(self, device: torch.device) -> Partition:
        """Move the tensors that calls on ``device`` read; in place."""
        for name in ("slots", "core", "secondary", "core_segments", "secondary_segments"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    @property
    def refreshes(self) -> bool:
        """Whether the next decode step picks core anew."""
        return self.policy.refresh > 0 and (self.step + 1) % self.policy.refresh == 0

    @property
    def weighs(self) -> bool:
        """Whether the next decode step's softmax rows are wanted."""
        return self.refreshes or self.text is not None

    @property
    def segments(self) -> Tensor:
        """What the next decode step reads; int64 ``[B, MAX_SEGMENTS, 2]``."""
        secondary = self.refreshes or self.policy.refresh == 0
        whole = self.secondary_segments if secondary else self.core_segments
        cuts = [None] * len(self.slots) if self.text is None else [self.text.cut(row) for row in range(len(self.slots))]
        if not any(cut is not None for cut in cuts):
            return whole
        ranges, visual = (
            (self.secondary_ranges, self.secondary_runs) if secondary else (self.core_ranges, self.core_runs)
        )
        parts = [self._without_text(*row) for row in zip(ranges, visual, cuts, strict=True)]
        return _segments(parts).to(whole.device)

    def _without_text(
        self, ranges: list[tuple[int, int]], visual: list[tuple[int, int]], cut: int | None
    ) -> list[tuple[int, int]]:
        """``ranges`` of one row without the text from ``cut`` to the end of the cache; later keys are read again."""
        if cut is None:
            return ranges
        before = [(start, min(end, cut)) for start, end in ranges if start < cut]
        behind = [(max(start, cut), end) for start, end in visual if end > cut]
        return [*before, *behind, (self.length, _END)]

    # ---- moving rows -----------------------------------------------------------------------------------------------

    def first_order(self, layer: int, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Rank the visual keys of ``layer`` by ``scores`` ``[B, KV, keys]``: core first, then secondary, then minor.

        Within each they keep their order. Returns ``(source, slots)`` as `avl::partition_` takes them.
        """
        scores = self._of_slots(scores, self.slots)
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        zone = (rank >= self.core[:, None, None]).long() + (rank >= self.secondary[:, None, None]).long()
        order = zone.argsort(dim=-1, stable=True)
        self.tokens[layer] = order
        slots = self.slots[:, None].expand_as(order)
        return slots.gather(2, order), slots

    def next_order(self, layer: int, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        """Pick core anew among secondary by one step's softmax rows ``[B, KV, keys]``.

        Returns ``(source, slots)`` of the rows that change places, or ``None`` when none does.
        """
        width = int(self.secondary.max())
        if width == 0:
            return None
        if weights.device.type == "cpu":
            room = 2 * int(torch.minimum(self.core, self.secondary - self.core).max())
            moved = reselect_native(weights, self.slots, self.tokens[layer], self.core, self.secondary, room)
            if moved is not None:
                return moved if moved[0].shape[2] else None
        slots, tokens = self.slots[:, :width], self.tokens[layer][..., :width]
        index = torch.arange(width, device=slots.device)
        scores = self._of_slots(weights, slots)
        scores = scores.masked_fill(index >= self.secondary[:, None, None], -torch.inf)
        # Equal scores go to the earlier token.
        by_token = tokens.argsort(-1)
        rank = torch.empty_like(by_token)
        best = by_token.gather(2, scores.gather(2, by_token).argsort(dim=-1, descending=True, stable=True))
        rank.scatter_(2, best, index.expand_as(best))
        wanted, inside = rank < self.core[:, None, None], index < self.core[:, None, None]
        entering, leaving = wanted & ~inside, ~wanted & inside
        moves = int(entering.sum(-1).max())
        if moves == 0:
            return None
        here = leaving.long().argsort(dim=-1, descending=True, stable=True)[..., :moves]
        there = entering.long().argsort(dim=-1, descending=True, stable=True)[..., :moves]
        real = entering.gather(2, there)
        pairs, partners = torch.cat([here, there], -1), torch.cat([there, here], -1)
        real = torch.cat([real, real], -1)
        all_slots = slots[:, None].expand_as(tokens)
        target = all_slots.gather(2, pairs).masked_fill(~real, -1)
        source = all_slots.gather(2, partners).masked_fill(~real, 0)
        # Rows with fewer moves than others write into a column of their own, which is thrown away.
        padded = torch.cat([tokens, tokens[..., :1]], -1)
        padded.scatter_(2, pairs.masked_fill(~real, width), tokens.gather(2, partners))
        self.tokens[layer][..., :width] = padded[..., :width]
        return source, target

    def _of_slots(self, rows: Tensor, slots: Tensor) -> Tensor:
        """``rows`` ``[B, KV, keys]`` at ``slots``: ``[B, G, slots]``, minus infinity where there is no slot."""
        if self.policy.scores == "shared":
            rows = rows.mean(1, keepdim=True)
        index = slots[:, None].expand(-1, rows.shape[1], -1)
        return rows.gather(2, index.clamp(min=0)).masked_fill(index < 0, -torch.inf)

    # ---- riding on key tensors -------------------------------------------------------------------------------------

    def attach(self, keys: Sequence[Tensor]) -> None:
        """Let this state ride on ``keys``, the key tensors of all its layers as they are now."""
        for tensor in keys:
            setattr(tensor, _ATTRIBUTE, (self, self.generation, _version(tensor)))


def find_partition(
    keys: Sequence[Tensor], policy: VisionPolicy, text_policy: TextPolicy | None = None
) -> Partition | None:
    """The state that rides on all of ``keys``; ``None`` when it is missing, out of date or another plan's."""
    found = {id(state): state for state in (_valid(tensor) for tensor in keys)}
    if len(found) != 1:
        return None
    partition = next(iter(found.values()))
    if partition is None or partition.policy != policy:
        return None
    return partition if (None if partition.text is None else partition.text.policy) == text_policy else None


def _valid(tensor: Tensor) -> Partition | None:
    state = getattr(tensor, _ATTRIBUTE, None)
    if state is None:
        return None
    partition, generation, version = state
    return partition if generation == partition.generation and version == _version(tensor) else None


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _ranges(slots: Tensor, keep: Tensor) -> Ranges:
    """Everything but the slots beyond the first ``keep``."""
    ranges: Ranges = []
    for positions, count in zip(slots.tolist(), keep.tolist(), strict=True):
        start, row = 0, []
        for position in (p for p in positions[count:] if p >= 0):
            if position > start:
                row.append((start, position))
            start = position + 1
        ranges.append([*row, (start, _END)])
    return ranges


def _runs(slots: Tensor, keep: Tensor) -> Ranges:
    """The first ``keep`` slots."""
    runs: Ranges = []
    for positions, count in zip(slots.tolist(), keep.tolist(), strict=True):
        row: list[tuple[int, int]] = []
        for position in positions[:count]:
            if row and row[-1][1] == position:
                row[-1] = (row[-1][0], position + 1)
            else:
                row.append((position, position + 1))
        runs.append(row)
    return runs


def _segments(ranges: Ranges) -> Tensor:
    """As `avl::partitioned_decode` takes them; int64 ``[B, MAX_SEGMENTS, 2]``."""
    segments = torch.zeros(len(ranges), MAX_SEGMENTS, 2, dtype=torch.int64)
    for row, pairs in enumerate(ranges):
        segments[row, : len(pairs)] = torch.tensor([(start, end - start) for start, end in pairs], dtype=torch.int64)
    return segments
