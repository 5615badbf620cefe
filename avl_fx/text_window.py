"""Which text keys a partitioned cache still reads (A-VL, arXiv 2409.14846, section 4.3).

Text is what stands behind the first visual key of a batch row and is neither visual nor padding. Beyond a budget, half
of what is read is the newest, half the heaviest; what leaves is not read again until the next prompt. Rows that stay
are moved to the front of the text's own positions, so that what is read is contiguous and nothing is lost: a new token
takes the place of the one that it drives out.

All layers of a cache keep equally many text keys; which ones they are differs.

A compact cache (`avl_fx.cache`) does not store what has left: there a window holds the slots of stored rows alone, and
only counts the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from avl_fx.kernels.partition.native import forget_native
from avl_fx.policies import TextPolicy

__all__ = ["TextWindow"]

Moves = tuple[Tensor, Tensor]
"""``(source, slots)`` as `avl::partition_` takes them, int64 ``[batch, 1, moves]``."""


@dataclass
class TextWindow:
    """Text slots of one cache, on the CPU, and what lies in them in each of its layers.

    Slots of a batch row are the positions of its text in ascending order. The first `kept` of them hold what is read.
    """

    policy: TextPolicy
    active: list[bool]
    """Batch rows with a visual key; the others keep all their text."""
    counts: list[int]
    """Text keys in the cache, read or not."""
    kept: list[int]
    slots: Tensor
    """int64 ``[batch, capacity]``"""
    tokens: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> int64 ``[batch, capacity]``: the position at which the token in each slot once entered the cache."""
    scores: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> float32 ``[batch, capacity]``"""
    gone: list[int] = field(default_factory=list)
    """Text keys that are not in the cache any more: those of a compact one that have left."""
    newest: int = 0
    """When the last slot in use was filled, in tokens of the sequence."""

    @classmethod
    def start(
        cls,
        policy: TextPolicy,
        visual: Tensor,
        visible: Tensor | None,
        before: TextWindow | None = None,
        missing: int = 0,
    ) -> TextWindow:
        """The window after a prompt: all text is read, until `forget` is asked for each layer.

        Args:
            policy: the plan's.
            visual: bool ``[batch, keys]``, the visual keys of the whole cache.
            visible: bool ``[batch, keys]``, without padding; ``None``: all of them.
            before: the window that the cache had until now. Rows that it moved keep their age.
            missing: tokens that the cache does not hold any more; new rows are older than they look by so many.
        """
        visual = visual.cpu()
        text = (visual.cumsum(1) > 0) & ~visual
        if visible is not None:
            text &= visible[:, : text.shape[1]].cpu()
        counts = text.sum(1).tolist()
        slots = torch.zeros(len(text), max([*counts, 1]), dtype=torch.int64, device="cpu")
        for row, flags in enumerate(text):
            slots[row, : counts[row]] = flags.nonzero().flatten()
        gone = [0] * len(counts) if before is None else list(before.gone)
        window = cls(policy, visual.any(1).tolist(), counts, list(counts), slots, gone=gone)
        if before is not None:
            window.tokens = {layer: before._ages(layer, slots, missing) for layer in before.tokens}
        return window

    def _ages(self, layer: int, slots: Tensor, missing: int) -> Tensor:
        """When the token in each of ``slots`` entered the cache, in tokens of the sequence."""
        ages = slots + missing
        for row, count in enumerate(self.counts):
            old = self.slots[row, :count]
            at = torch.searchsorted(old.contiguous(), slots[row].contiguous()).clamp(max=max(count - 1, 0))
            if count:
                moved = old[at] == slots[row]
                ages[row, moved] = self.tokens[layer][row, at[moved]]
        return ages

    def append(self, position: int, age: int | None = None) -> None:
        """A decode step stored one token a row at ``position``, the sequence's token number ``age``; it is read now."""
        capacity = self.slots.shape[1]
        if max(self.counts) == capacity:
            more = max(64, capacity)
            self.slots = _padded(self.slots, more)
            self.tokens = {layer: _padded(t, more) for layer, t in self.tokens.items()}
            self.scores = {layer: _padded(t, more) for layer, t in self.scores.items()}
        self.slots[torch.arange(len(self.counts), device="cpu"), self.counts] = position
        self.newest = position if age is None else age
        self.counts = [count + 1 for count in self.counts]

    def budget(self, row: int) -> int:
        """Text keys that batch row ``row`` may read."""
        if not self.active[row]:
            return self.counts[row]
        return max(round(self.policy.budget * (self.counts[row] + self.gone[row])), self.policy.minimum)

    def forget(self, layer: int, weights: Tensor, appended: bool) -> Moves | None:
        """Score the text of ``layer`` and drive out what is beyond the budget. `settle` follows, once for all layers.

        Args:
            layer: a layer that owns keys.
            weights: softmax row of this step (or the scores of a prompt), float32 ``[batch, kv_heads, keys]``.
            appended: whether `append` came before.

        Returns:
            The rows that change places, or ``None``.
        """
        if layer not in self.tokens:
            self.tokens[layer] = self.slots.clone()
        if layer not in self.scores:
            self.scores[layer] = torch.zeros(self.slots.shape, dtype=torch.float32, device="cpu")
        weights = weights.detach().to("cpu", torch.float32).contiguous()
        budgets = [self.budget(row) for row in range(len(self.counts))]
        quantile = 1 - self.policy.budget if self.policy.decay == "forgetting" else -1.0
        content = self.slots, self.tokens[layer], self.scores[layer]
        entered = self.newest if appended else None
        moves = forget_native(weights, *content, self.kept, self.counts, budgets, quantile, entered)
        if moves is None:
            moves = self._forget_slowly(layer, weights, budgets, quantile, appended)
        return moves if moves[0].shape[2] else None

    def settle(self, appended: bool) -> None:
        """Take note of how many text keys stay, after `forget` of all layers."""
        for row, kept in enumerate(self.kept):
            self.kept[row] = min(kept + int(appended), self.budget(row))

    @property
    def leaves_out(self) -> bool:
        """Whether any text is not read."""
        return self.kept != self.counts

    def cut(self, row: int) -> int | None:
        """The first text position of batch row ``row`` that is not read any more; ``None``: all of them are."""
        return int(self.slots[row, self.kept[row]]) if self.kept[row] < self.counts[row] else None

    # ---- compact caches --------------------------------------------------------------------------------------------

    def packed(self, places: Tensor) -> TextWindow:
        """The window of a cache without the rows that are not read.

        Args:
            places: int64 ``[batch, keys]``: where each row goes.
        """
        width = max([*self.kept, 1])
        left = [count - kept for count, kept in zip(self.counts, self.kept, strict=True)]
        return replace(
            self,
            counts=list(self.kept),
            kept=list(self.kept),
            slots=places.gather(1, self.slots[:, :width]),
            tokens={layer: tokens[:, :width].clone() for layer, tokens in self.tokens.items()},
            scores={layer: scores[:, :width].clone() for layer, scores in self.scores.items()},
            gone=[before + more for before, more in zip(self.gone, left, strict=True)],
        )

    def close_ranks(self, ends: list[int]) -> list[tuple[int, int]] | None:
        """After a decode step on a compact cache: each row's new token, if it stays, goes to the end of its own rows.

        Args:
            ends: rows that each batch row occupied before the step; brought up to date.

        Returns:
            For each batch row ``(source, target)`` of the row to move, ``(0, -1)`` for none; ``None`` if none moves.
        """
        moves = []
        for row, kept in enumerate(self.kept):
            count, self.counts[row] = self.counts[row], kept
            self.gone[row] += count - kept
            newest = int(self.slots[row, count - 1])
            moved = (0, -1)
            if kept == count:  # it stays, in every layer, in the slot where it was stored
                if newest > ends[row]:
                    self.slots[row, count - 1] = ends[row]
                    moved = (newest, ends[row])
                ends[row] += 1
            moves.append(moved)
        return moves if any(target >= 0 for _, target in moves) else None

    def select(self, index: Tensor) -> TextWindow:
        """The window of a cache that holds the batch rows ``index`` of this one."""
        rows = index.tolist()
        return replace(
            self,
            active=[self.active[row] for row in rows],
            counts=[self.counts[row] for row in rows],
            kept=[self.kept[row] for row in rows],
            gone=[self.gone[row] for row in rows],
            slots=self.slots[index],
            tokens={layer: tokens[index] for layer, tokens in self.tokens.items()},
            scores={layer: scores[index] for layer, scores in self.scores.items()},
        )

    def _forget_slowly(self, layer: int, weights: Tensor, budgets: list[int], quantile: float, appended: bool) -> Moves:
        """What `forget_native` does, where there is no compiler."""
        pairs = []
        for row, budget in enumerate(budgets):
            slots, tokens, scores = self.slots[row], self.tokens[layer][row], self.scores[layer][row]
            candidates = list(range(self.kept[row]))
            if appended and self.counts[row]:
                last = self.counts[row] - 1
                candidates.append(last)
                tokens[last], scores[last] = self.newest, 0.0
            if candidates:
                weight = weights[row].mean(0)[slots[candidates]]
                scores[candidates] += weight - (weight.quantile(quantile) if quantile >= 0 else 0.0)
            stay = candidates
            if len(candidates) > budget:
                by_age = sorted(candidates, key=lambda j: int(tokens[j]))
                recent, rest = by_age[len(by_age) - budget // 2 :], by_age[: len(by_age) - budget // 2]
                stay = recent + sorted(rest, key=lambda j: -float(scores[j]))[: budget - budget // 2]
            front = range(len(stay))
            holes = [j for j in front if j not in stay]
            moved = []
            for hole, outside in zip(holes, sorted(j for j in stay if j not in front), strict=True):
                moved += [(int(slots[outside]), int(slots[hole])), (int(slots[hole]), int(slots[outside]))]
                for content in (tokens, scores):
                    content[[hole, outside]] = content[[outside, hole]]
            pairs.append(moved)
        most = max(map(len, pairs))
        padded = [moved + [(0, -1)] * (most - len(moved)) for moved in pairs]
        table = torch.tensor(padded, dtype=torch.int64, device="cpu").view(len(pairs), most, 2)
        return table[:, None, :, 0].contiguous(), table[:, None, :, 1].contiguous()


def _padded(tensor: Tensor, more: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(len(tensor), more)], 1)
