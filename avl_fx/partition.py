"""The state of a partitioned cache: which rows hold core, secondary and minor visual keys (A-VL, arXiv 2409.14846).

Attention over keys that are all visible does not depend on their order, and RoPE is already in the keys. So the visual
rows of a stock cache are reordered inside their own positions, core first, then secondary, then minor; text stays where
it is. The cache remains complete: dense attention over it still gives the exact answer.

All layers of a cache have the same layout, one `Partition`; what differs is which visual token lies in which row. It
rides on the key tensors, with a generation number and the tensors' versions: a cache that was cropped, reordered or
written by somebody else has no valid state, and is attended to densely. A deep copy has a state of its own.

Of a compact cache (`avl_fx.cache`) minor is not stored. Its positions are those of the rows that are there.
"""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from avl_fx.kernels.partition.native import reselect_native
from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from avl_fx.kernels.reselect import reselect
from avl_fx.moves import Moves
from avl_fx.policies import TextPolicy, VisionPolicy
from avl_fx.record import Undivided, note_division
from avl_fx.stored_rows import StoredRows
from avl_fx.text_window import TextWindow
from avl_fx.zones import spread_order, spread_out, zones

__all__ = ["Partition", "detach", "everything", "find_partition", "ranges_of", "state_of"]

log = logging.getLogger("avl_fx")

MOST_RANGES = MAX_SEGMENTS - 1
"""Ranges of a batch row after a prompt. One is left for the hole that packing leaves behind a shorter batch row."""

MOST_ENTRIES = 2**16
"""Of rows that change places on a CPU, in all layers that are served at once."""

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


def one_by_one(device: torch.device) -> bool:
    """Whether layers put their rows in order one after the other behind a prompt: on a CPU.

    There a call costs little, and only the rows that change places in a refresh are named. Elsewhere all layers are
    served at once, and nothing asks the device how many these are.
    """
    return device.type == "cpu"


@lru_cache(maxsize=64)
def _everything(batch: int, device: torch.device, weigh: bool) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept for later calls, which may run in any mode
        segments = torch.zeros(batch, MAX_SEGMENTS, 2, dtype=torch.int64, device="cpu")
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
    most_secondary: int
    """At least the rows of secondary in any batch row. A number of the host, as the next: nobody asks the device."""
    most_entering: int
    """At least as many rows as a refresh may bring into core, in any batch row."""
    length: int
    """Keys in the cache."""
    text: TextWindow | None = None
    """``None``: all text is read."""
    step: int = 0
    """Decode steps since the last prompt."""
    generation: int = 0
    """Calls so far: older key tensors of this cache are out of date."""
    model: uuid.UUID | None = None
    """Whose cache it is: another model does not see what this one saw."""
    tokens: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> int64 ``[B, G, N]``: which visual token of the row lies in which slot, since its first prompt.

    Of a compact cache: which of those that it stores."""
    stored: StoredRows | None = None
    """Of a compact cache. Its rows are not all of the sequence's tokens."""

    @classmethod
    def start(
        cls,
        policy: VisionPolicy,
        visual: Tensor,
        text_policy: TextPolicy | None = None,
        visible: Tensor | None = None,
        before: Partition | None = None,
        stored: StoredRows | None = None,
    ) -> Partition | None:
        """The layout after a prompt.

        Args:
            policy: the plan's.
            visual: bool ``[B, keys]``, of the whole cache.
            text_policy: the plan's; ``None``: all text is read.
            visible: bool ``[B, keys]``, without padding; ``None``: all of them.
            before: the state that the cache had until now.
            stored: the layout of a compact cache, the prompt included. Shares are of all visual tokens ever fed.

        Returns:
            ``None`` without visual keys, or with too many spans of them.
        """
        visual = visual.to("cpu")
        counts = visual.sum(1)
        most = int(counts.max()) if len(counts) else 0
        if most == 0:
            note_division(Undivided.NO_VISUAL)
            return None
        slots = torch.full((len(visual), most), -1, dtype=torch.int64, device="cpu")
        for row, flags in enumerate(visual):
            slots[row, : counts[row]] = flags.nonzero().flatten()
        totals = counts.tolist() if stored is None else stored.visual
        core, secondary = (
            torch.tensor([int(share * n) for n in totals], dtype=torch.int64, device="cpu").clamp(max=counts)
            for share in (policy.core, policy.secondary)
        )
        gaps = stored if text_policy is None else None  # under a text window every step knows where rows end
        reads = _reads(slots, core, secondary, gaps, most=MOST_RANGES)
        if reads is None or (text_policy is not None and _most_cut(reads) > MAX_SEGMENTS):
            log.warning("too many ranges of keys to read in a row (%d fit): attention stays dense", MOST_RANGES)
            note_division(Undivided.RANGES)
            return None
        text = None
        if text_policy is not None:
            missing = 0 if stored is None else stored.length - stored.count
            text = TextWindow.start(text_policy, visual, visible, None if before is None else before.text, missing)
        length = visual.shape[1]
        partition = cls(policy, visual, slots, core, secondary, **reads, length=length, text=text, stored=stored)
        if before is not None:
            partition.tokens = {layer: _longer(tokens, most) for layer, tokens in before.tokens.items()}
        return partition

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
    def reads_secondary(self) -> bool:
        """Whether the next decode step reads secondary instead of core alone."""
        return self.refreshes or self.policy.refresh == 0

    @property
    def weighs(self) -> bool:
        """Whether the next decode step's softmax rows are wanted."""
        return self.refreshes or self.text is not None

    @property
    def segments(self) -> Tensor:
        """What the next decode step reads; int64 ``[B, MAX_SEGMENTS, 2]``."""
        secondary = self.reads_secondary
        whole = self.secondary_segments if secondary else self.core_segments
        cuts = self._cuts()
        if not any(cut is not None for cut in cuts):
            return whole
        ranges, visual = (
            (self.secondary_ranges, self.secondary_runs) if secondary else (self.core_ranges, self.core_runs)
        )
        parts = [self._without_text(*row) for row in zip(ranges, visual, cuts, strict=True)]
        return _segments(parts).to(whole.device)

    def _cuts(self) -> Sequence[int | None]:
        """For each batch row, where the text that is not read begins."""
        if self.text is None:
            return [None] * len(self.slots)
        if self.stored is not None:  # it is not there at all
            return self.stored.ends
        return [self.text.cut(row) for row in range(len(self.slots))]

    def _without_text(
        self, ranges: list[tuple[int, int]], visual: list[tuple[int, int]], cut: int | None
    ) -> list[tuple[int, int]]:
        """``ranges`` of one row without the text from ``cut`` to the end of the cache; later keys are read again."""
        if cut is None:
            return ranges
        before = [(start, min(end, cut)) for start, end in ranges if start < cut]
        behind = [(max(start, cut), end) for start, end in visual if end > cut]
        return [*before, *behind, (self.length, _END)]

    @cached_property
    def visual_segments(self) -> Tensor | None:
        """All visual rows; int64 ``[B, MAX_SEGMENTS, 2]``. ``None``: more ranges in a batch row than that.

        Kept, for each step asks: where rows are visual does not change while a state lives.
        """
        runs = _runs(self.slots, (self.slots >= 0).sum(1))
        return None if max(map(len, runs)) > MAX_SEGMENTS else _segments(runs).to(self.slots.device)

    # ---- moving rows -----------------------------------------------------------------------------------------------

    def first_moves(self, scores: Mapping[int, Tensor]) -> Iterator[Moves]:
        """Put the visual keys of each layer in order by its scores ``[B, KV, keys]``: core, then secondary, then minor.

        Within each they keep their order.
        """
        for layers, rows in self._stacked(scores):
            places = self.slots[:, None].expand(-1, rows.shape[2], -1)
            ranked = rows.gather(3, places.clamp(min=0).expand(len(layers), -1, -1, -1))
            ranked = ranked.masked_fill(places < 0, -torch.inf)
            if self.policy.spread:
                turns = self._spread_order(layers, ranked)
                ranked = spread_out(ranked, self.secondary, self.policy.spread, turns)
            order = zones(ranked, self.core, self.secondary).argsort(dim=-1, stable=True)
            for layer, its_order in zip(layers, order, strict=True):
                earlier = self.tokens.get(layer)
                self.tokens[layer] = its_order if earlier is None else earlier.to(order.device).gather(2, its_order)
            slots = places.expand_as(order)
            yield Moves(layers, slots.gather(3, order), slots)

    def _spread_order(self, layers: Sequence[int], like: Tensor) -> Tensor:
        """`spread_order` of the rows as they lie; int64, the shape of ``like`` ``[layers, B, G, N]``."""
        own = torch.arange(like.shape[3], device=like.device).expand(like.shape[1:])
        tokens = [self.tokens[layer].to(like.device) if layer in self.tokens else own for layer in layers]
        return spread_order(torch.stack(tokens), layers)

    def next_moves(self, weights: Mapping[int, Tensor]) -> Iterator[Moves]:
        """Pick core of each layer anew among secondary by one step's softmax rows ``[B, KV, keys]``.

        Yields nothing where it is known that no row changes places.
        """
        if self.most_entering == 0:
            return
        if all(one_by_one(rows.device) for rows in weights.values()):
            for layers in self._at_once(weights):
                yield from self._native_moves({layer: weights[layer] for layer in layers})
        else:
            yield from self._next_moves(weights)

    def _at_once(self, weights: Mapping[int, Tensor]) -> Iterator[list[int]]:
        """Layers alike, so many that what is said of their rows stays in a processor's cache."""
        alike: dict[Any, list[int]] = {}
        for layer, rows in weights.items():
            alike.setdefault((rows.shape, self.tokens[layer].shape), []).append(layer)
        for layers in alike.values():
            batch, groups, _ = self.tokens[layers[0]].shape
            most = max(1, MOST_ENTRIES // (batch * groups * 2 * self.most_entering))
            yield from (layers[first : first + most] for first in range(0, len(layers), most))

    def _native_moves(self, weights: Mapping[int, Tensor]) -> Iterator[Moves]:
        tokens, room = [self.tokens[layer] for layer in weights], 2 * self.most_entering
        order = reselect_native([*weights.values()], self.slots, tokens, self.core, self.secondary, room)
        if order is None:
            yield from self._next_moves(weights)
        elif order[0].shape[3]:
            yield Moves(tuple(weights), *order)

    def _next_moves(self, weights: Mapping[int, Tensor]) -> Iterator[Moves]:
        for layers, rows in self._stacked(weights):
            tokens = torch.stack([self.tokens[layer] for layer in layers])
            sizes = self.most_secondary, self.most_entering
            source, slots = reselect(rows, self.slots, tokens, self.core, self.secondary, *sizes)
            self.tokens.update(zip(layers, tokens, strict=True))
            yield Moves(layers, source, slots)

    def _stacked(self, rows: Mapping[int, Tensor]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """``rows`` ``[B, KV, keys]`` of layers that are served at once, as ``[layers, B, G, keys]``."""
        alike: dict[Any, list[int]] = {}
        for layer, tensor in rows.items():
            alike.setdefault(layer if one_by_one(tensor.device) else tensor.shape, []).append(layer)
        for layers in alike.values():
            stacked = torch.stack([rows[layer] for layer in layers])
            yield tuple(layers), stacked.mean(2, keepdim=True) if self.policy.scores == "shared" else stacked

    # ---- compact caches ---------------------------------------------------------------------------------------------

    def pack(self, visible: Tensor | None) -> tuple[Partition, Tensor]:
        """Leave out what no later step reads: minor, text that has left, padding.

        Args:
            visible: bool ``[B, keys]``, without padding; ``None``: all of them.

        Returns:
            The state of the packed cache, and for each of its rows the one that goes there, int64 ``[B, rows]`` with
            ``-1`` for none.
        """
        stored = self.stored or StoredRows.of_complete(self.length, self.visual.sum(1).tolist())
        keep = torch.ones(len(self.visual), self.length, dtype=torch.bool, device="cpu")
        if visible is not None:
            keep &= visible[:, : self.length]
        slots, secondary = self.slots.cpu(), self.secondary.tolist()
        for row, positions in enumerate(slots):
            left = positions[secondary[row] :]
            keep[row, left[left >= 0]] = False
            if self.text is not None:
                keep[row, self.text.slots[row, self.text.kept[row] : self.text.counts[row]]] = False
        stored, source, places = stored.pack(keep)
        slots = slots[:, : max([*secondary, 1])]
        beyond = torch.arange(slots.shape[1], device="cpu") >= self.secondary.cpu()[:, None]
        slots = places.gather(1, slots.clamp(min=0)).masked_fill(beyond, -1)
        text = self.text
        if text is not None:
            text = text.packed(places)
            stored.shown = [-1] * len(slots)
            for row, active in enumerate(text.active):
                if active and stored.ends[row]:
                    # Its first row is visible: padding was left out. A visual one there need not be.
                    stored.shown[row] = int(stored.columns[row, 0])
                    stored.columns[row, text.slots[row, : text.counts[row]]] = stored.shown[row]
        reads = _reads(slots, self.core.cpu(), self.secondary.cpu(), stored if text is None else None)
        assert reads is not None, "`start` left room for the hole of a shorter row"
        packed = replace(
            self,
            **reads,
            visual=_padded(self.visual, self.length).gather(1, source.clamp(min=0)) & (source >= 0),
            slots=slots,
            length=stored.count,
            text=text,
            tokens={n: _renumbered(tokens, self.secondary, slots.shape[1]) for n, tokens in self.tokens.items()},
            stored=stored,
        )
        return packed.to(self.slots.device), source

    def leave_out_keys(self) -> None:
        """From now on lazy layers own no keys of visual tokens; of as many as every batch row has."""
        assert self.stored is not None
        # One row stays: a cache without any is taken for one that nothing was fed to.
        most = max(0, min(int((self.slots >= 0).sum(1).min()), self.length - 1))
        self.stored.keyless = 0 if self.visual_segments is None else most  # a step has to be told where they are

    @property
    def lacks_keys(self) -> bool:
        """Whether lazy layers own fewer keys than there are rows."""
        return self.stored is not None and self.stored.keyless > 0

    @property
    def owned_rows(self) -> Tensor:
        """The rows for which lazy layers own keys, int64 ``[B, length - keyless]`` on the CPU, in order."""
        assert self.stored is not None
        positions = torch.arange(self.length, device="cpu")
        left_out = self.slots.cpu()[:, : self.stored.keyless]
        return torch.stack([positions[~torch.isin(positions, row)] for row in left_out])

    @property
    def key_rows(self) -> Tensor:
        """Where the keys of lazy layers have each row, int64 ``[B, length]``; ``-1``: it is visual."""
        positions = torch.arange(self.length, device=self.slots.device)
        return self._in_owned_keys(positions.expand(len(self.slots), 1, -1))[:, 0]

    def moved_keys(self, order: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """``(source, slots)`` of text rows that change places, as the keys of lazy layers have these rows."""
        source, slots = order
        slots = slots if slots.dim() == 3 else slots[:, None]
        return self._in_owned_keys(source).clamp(min=0), self._in_owned_keys(slots)

    def _in_owned_keys(self, rows: Tensor) -> Tensor:
        """``rows`` int64 ``[B, G, M]`` as the keys of lazy layers have them; ``-1`` for visual rows, and for ``-1``."""
        visual = self._ascending[:, None].expand(-1, rows.shape[1], -1).contiguous()
        before = torch.searchsorted(visual, rows.contiguous())
        is_visual = visual.gather(2, before.clamp(max=visual.shape[2] - 1)) == rows
        left_out = 0 if self.stored is None else self.stored.keyless
        return (rows - before.clamp(max=left_out)).masked_fill(is_visual | (rows < 0), -1)

    @cached_property
    def _ascending(self) -> Tensor:
        """`slots` with numbers beyond every row where a batch row has none: in order to its end."""
        return self.slots.masked_fill(self.slots < 0, _END)

    def close_ranks(self) -> tuple[Tensor, Tensor] | None:
        """After a decode step under a text window: what the step's row drove out is not stored any more.

        Returns:
            ``(source, slots)`` of new rows that go to the end of a shorter batch row, as `avl::partition_` takes them;
            ``None`` when none does. All rows from `length` on may then be forgotten.
        """
        assert self.stored is not None
        assert self.text is not None
        ends = list(self.stored.ends)
        moves = self.text.close_ranks(ends)
        self.stored.close_ranks(ends)
        self.length = self.stored.count
        if moves is None:
            return None
        table = torch.tensor(moves, dtype=torch.int64, device=self.slots.device)
        return table[:, None, :1].contiguous(), table[:, None, 1:].contiguous()

    def select(self, index: Tensor) -> Partition:
        """The state of a compact cache that holds the batch rows ``index`` int64 of this one."""
        rows, here, there = index.tolist(), index.cpu(), index.to(self.slots.device)

        def picked(ranges: Ranges) -> Ranges:
            return [ranges[row] for row in rows]

        return replace(
            self,
            visual=self.visual[here],
            slots=self.slots[there],
            core=self.core[there],
            secondary=self.secondary[there],
            core_ranges=picked(self.core_ranges),
            secondary_ranges=picked(self.secondary_ranges),
            core_runs=picked(self.core_runs),
            secondary_runs=picked(self.secondary_runs),
            core_segments=self.core_segments[there],
            secondary_segments=self.secondary_segments[there],
            text=None if self.text is None else self.text.select(here),
            tokens={layer: order[there] for layer, order in self.tokens.items()},
            stored=None if self.stored is None else self.stored.select(here),
        )

    def cropped(self, tokens: int) -> Partition | None:
        """The state without the last ``tokens``; ``None`` where they were not appended since the cache was packed."""
        prompt = self.visual.shape[1] if self.stored is None else self.stored.packed
        left = self.length - tokens
        if self.text is not None or left < prompt:
            return None
        stored = None if self.stored is None else self.stored.cropped(tokens)
        return replace(self, visual=self.visual[:, :left], length=left, stored=stored)

    # ---- copies and crops of a complete cache ----------------------------------------------------------------------

    def entered(self, layer: int, keys: int) -> Tensor:
        """At which position the row that lies at each one entered the cache; int64 ``[B, G, keys]`` on the CPU."""
        slots, tokens = self.slots.cpu(), self.tokens.get(layer)
        groups = 1 if tokens is None else tokens.shape[1]
        found = torch.arange(keys, device="cpu").repeat(len(slots), groups, 1)
        for row, entered in enumerate(found):
            if tokens is not None:
                visual = slots[row][slots[row] >= 0]
                entered[:, visual] = visual[tokens[row, :, : len(visual)].cpu()]
            if self.text is not None and layer in self.text.tokens:
                count = self.text.counts[row]
                entered[:, self.text.slots[row, :count]] = self.text.tokens[layer][row, :count]
        return found

    # ---- riding on key tensors -------------------------------------------------------------------------------------

    def attach(self, keys: Sequence[Tensor]) -> None:
        """Let this state ride on ``keys``, the key tensors of all its layers as they are now."""
        riding: dict[int, _Attached] = {}
        for tensor in keys:
            version = _version(tensor)
            if version not in riding:
                riding[version] = _Attached(self, self.generation, version)
            setattr(tensor, _ATTRIBUTE, riding[version])


def detach(tensor: Tensor) -> None:
    """Let no state ride on ``tensor``."""
    vars(tensor).pop(_ATTRIBUTE, None)


@dataclass(frozen=True)
class _Attached:
    partition: Partition
    generation: int
    version: int
    """Of the tensor that it is attached to: later writes are somebody else's."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attached:
        # A copied cache has a state of its own. Copying counts as writing, always equally often.
        version = _version(copy.deepcopy(torch.empty(0, dtype=torch.float32, device="cpu")))
        return _Attached(copy.deepcopy(self.partition, memo), self.generation, version)


def _longer(tokens: Tensor, width: int) -> Tensor:
    """``tokens`` with those of new slots behind them, which lie where they entered."""
    new = torch.arange(tokens.shape[2], width, device=tokens.device)
    return torch.cat([tokens, new.expand(*tokens.shape[:2], -1)], 2)


def _renumbered(tokens: Tensor, kept: Tensor, width: int) -> Tensor:
    """The first ``width`` of ``tokens``, of which each batch row has kept so many, without gaps in their numbers."""
    left = tokens[..., :width]
    own = torch.arange(width, device=tokens.device)
    there = own < kept[:, None, None]
    present = torch.zeros_like(tokens).scatter_(-1, left, there.expand_as(left).long())
    return (present.cumsum(-1) - 1).gather(-1, left).where(there, own)


def find_partition(
    keys: Sequence[Tensor], policy: VisionPolicy, text_policy: TextPolicy | None = None
) -> Partition | None:
    """The state that rides on all of ``keys``; ``None`` when it is missing, out of date or another plan's."""
    partition = state_of(keys)
    if partition is None or partition.policy != policy:
        return None
    return partition if (None if partition.text is None else partition.text.policy) == text_policy else None


def state_of(keys: Sequence[Tensor]) -> Partition | None:
    """The state that rides on all of ``keys``, whichever plan it belongs to; ``None`` when it is out of date."""
    found = {id(state): state for state in (_valid(tensor) for tensor in keys)}
    return next(iter(found.values())) if len(found) == 1 else None


def _valid(tensor: Tensor) -> Partition | None:
    found = getattr(tensor, _ATTRIBUTE, None)
    if found is None or found.generation != found.partition.generation or found.version != _version(tensor):
        return None
    return found.partition


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _reads(
    slots: Tensor, core: Tensor, secondary: Tensor, gaps: StoredRows | None, most: int = MAX_SEGMENTS
) -> dict[str, Any] | None:
    """What steps read: the fields of a `Partition` that follow from where its core and secondary lie.

    ``None``: in more than ``most`` ranges in a batch row.
    """
    core_ranges, secondary_ranges = _ranges(slots, core, gaps), _ranges(slots, secondary, gaps)
    if max(map(len, core_ranges + secondary_ranges)) > most:
        return None
    return {
        "core_ranges": core_ranges,
        "secondary_ranges": secondary_ranges,
        "core_runs": _runs(slots, core),
        "secondary_runs": _runs(slots, secondary),
        "core_segments": _segments(core_ranges),
        "secondary_segments": _segments(secondary_ranges),
        "most_secondary": int(secondary.max()),
        "most_entering": int(torch.minimum(core, secondary - core).max()),
    }


def _most_cut(reads: dict[str, Any]) -> int:
    """Ranges of a step under a text window: a cut may fall anywhere, and what is new stands behind the last key."""
    whole, runs = (reads[f"core_{part}"] + reads[f"secondary_{part}"] for part in ("ranges", "runs"))
    return max(map(len, whole)) + max(map(len, runs)) + 1


def _padded(visual: Tensor, keys: int) -> Tensor:
    """``visual`` bool ``[B, prompt]`` for ``keys``, of which decode steps brought the rest."""
    return torch.nn.functional.pad(visual, (0, keys - visual.shape[1]))


def _ranges(slots: Tensor, keep: Tensor, stored: StoredRows | None = None) -> Ranges:
    """Everything but the slots beyond the first ``keep``, and but what a batch row of a compact cache has not."""
    ranges: Ranges = []
    for number, (positions, count) in enumerate(zip(slots.cpu(), keep.tolist(), strict=True)):
        holes = _spans(positions[count:])
        if stored is not None and stored.ends[number] < stored.packed:
            holes.append((stored.ends[number], stored.packed))
        start, row = 0, []
        for first, end in sorted(holes):
            if first > start:
                row.append((start, first))
            start = max(start, end)
        ranges.append([*row, (start, _END)])
    return ranges


def _runs(slots: Tensor, keep: Tensor) -> Ranges:
    """The first ``keep`` slots."""
    return [_spans(positions[:count]) for positions, count in zip(slots.cpu(), keep.tolist(), strict=True)]


def _spans(positions: Tensor) -> list[tuple[int, int]]:
    """Ascending ``positions`` int64 ``[N]``, ``-1`` behind them, as (first, one behind the last) of each run."""
    there = positions[positions >= 0]
    if not len(there):
        return []
    last = torch.cat([there.diff() != 1, torch.ones(1, dtype=torch.bool, device="cpu")])
    first = last.roll(1)
    return list(zip(there[first].tolist(), (there[last] + 1).tolist(), strict=True))


def ranges_of(flags: Tensor) -> Tensor | None:
    """bool ``[B, positions]`` as ranges int64 ``[B, MAX_SEGMENTS, 2]``; ``None``: more of them in a batch row."""
    steps = torch.nn.functional.pad(flags.cpu().to(torch.int8), (1, 1)).diff(dim=1)
    starts, ends = [[row.nonzero().flatten().tolist() for row in steps == sign] for sign in (1, -1)]
    if max(map(len, starts), default=0) > MAX_SEGMENTS:
        return None
    return _segments([list(zip(*row, strict=True)) for row in zip(starts, ends, strict=True)])


def _segments(ranges: Ranges) -> Tensor:
    """As `avl::partitioned_decode` takes them; int64 ``[B, MAX_SEGMENTS, 2]``."""
    segments = torch.zeros(len(ranges), MAX_SEGMENTS, 2, dtype=torch.int64, device="cpu")
    for row, pairs in enumerate(ranges):
        lengths = [(start, end - start) for start, end in pairs]
        segments[row, : len(pairs)] = torch.tensor(lengths, dtype=torch.int64, device="cpu").view(-1, 2)
    return segments
