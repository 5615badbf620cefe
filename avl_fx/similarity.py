"""How alike the layers of a decoder attend, and how their attention spreads over an image: sums over samples.

A *sample* is one batch row of a prompt. Memory depends on the number of layers alone. Sums are kept in float64, in the
order in which batches arrive: what is summed up in two sittings is, to the last bit, what one sitting gives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["MASSES", "Statistics", "concentration", "divergences", "share_holding"]

MASSES = (0.5, 0.8, 0.9, 0.95)
"""Shares of the visual attention whose keys are counted."""

_ELEMENTS_AT_ONCE = 1 << 24
"""Bounds what comparing one layer with all others takes: 128 MiB."""


@dataclass
class Statistics:
    """Sums over samples. ``L`` is the number of decoder layers; all tensors are float64 on the CPU."""

    samples: int
    divergence: Tensor
    """``[L, L]``, symmetric: Jensen-Shannon divergences in nats (natural logarithm, at most ln 2), each the mean over
    query heads. Infinite where layers cannot be compared or may not share a block."""
    squares: Tensor
    """``[L, L]``: the same, squared."""
    visual_samples: Tensor
    """``[L]``: samples with visual keys, where the layer was observed."""
    mass: Tensor
    """``[L]``: of those, the share of the row that falls on visual keys, mean over query heads."""
    attending: Tensor
    """``[L]``: of those, samples that attend to visual keys at all: a sliding window may have left them behind."""
    spread: Tensor
    """``[L, len(MASSES)]``: of samples that do, the share of the visual keys that hold each of `MASSES`."""

    @classmethod
    def empty(cls, layers: int) -> Statistics:
        """Nothing seen yet. Layers that are never seen stay infinitely far from all others."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device="cpu")

        return cls(
            samples=0,
            divergence=zeros(layers, layers),
            squares=zeros(layers, layers),
            visual_samples=zeros(layers),
            mass=zeros(layers),
            attending=zeros(layers),
            spread=zeros(layers, len(MASSES)),
        )

    @property
    def layers(self) -> int:
        return len(self.mass)

    def add(
        self, rows: Mapping[int, Tensor], apart: Collection[tuple[int, int]], visual: Tensor | None, keys: int
    ) -> None:
        """Take in the rows of one batch.

        Args:
            rows: layer -> softmax rows ``[batch, heads, keys]``; see `avl_fx.observe`.
            apart: pairs ``(earlier, later)`` of layers that may not share a block.
            visual: visual keys, bool ``[batch, keys]``; ``None``: this model's keys are those of text.
            keys: which layers ``visual`` is for: those with so many keys.
        """
        self.samples += next(iter(rows.values())).shape[0]
        found = divergences(rows, apart, self.layers)
        self.divergence += found.sum(0)
        self.squares += found.square().sum(0)
        if visual is None:
            return
        for layer, row in rows.items():
            if row.shape[-1] != keys:
                continue
            mass, spread = concentration(row, visual)
            self.visual_samples[layer] += len(mass)
            self.mass[layer] += mass.sum()
            self.attending[layer] += len(spread)
            self.spread[layer] += spread.sum(0)

    # ---- means ---------------------------------------------------------------------------------------------------

    def mean_divergence(self) -> list[list[float]]:
        """``[L][L]`` nats, infinite where no block may hold both."""
        return (self.divergence / max(self.samples, 1)).tolist()

    def deviation(self) -> list[list[float]]:
        """``[L][L]`` nats: the standard deviation over samples; infinite where the divergence is."""
        mean = self.divergence / max(self.samples, 1)
        variance = (self.squares / max(self.samples, 1) - mean.square()).clamp(min=0)
        return variance.sqrt().nan_to_num(nan=math.inf).tolist()

    def visual_mass(self) -> list[float | None]:
        """The mean share of a layer's row that falls on visual keys; ``None`` where none were seen."""
        return [m / n if n else None for m, n in zip(self.mass.tolist(), self.visual_samples.tolist(), strict=True)]

    def visual_spread(self) -> list[tuple[float, ...] | None]:
        """The mean share of a layer's visual keys that hold each of `MASSES`; ``None`` where none were attended to."""
        pairs = zip(self.spread.tolist(), self.attending.tolist(), strict=True)
        return [tuple(s / n for s in shares) if n else None for shares, n in pairs]

    # ---- as tensors ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name; `samples` is a number and not among them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}

    @classmethod
    def of(cls, samples: int, tensors: Mapping[str, Any]) -> Statistics:
        """The inverse of `tensors`."""
        return cls(samples, **tensors)


def divergences(rows: Mapping[int, Tensor], apart: Collection[tuple[int, int]], layers: int) -> Tensor:
    """Jensen-Shannon divergence of every two layers, float64 ``[batch, layers, layers]`` on the CPU, in nats.

    ``JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2``, for each query head, then the mean over heads. Infinite for
    layers that are missing, ``apart``, or of another number of heads or keys.
    """
    batch = next(iter(rows.values())).shape[0]
    found = torch.full((batch, layers, layers), math.inf, dtype=torch.float64, device="cpu")
    found.diagonal(dim1=1, dim2=2).zero_()
    work = {layer: row.double() for layer, row in rows.items()}
    entropy = {layer: _entropy(row) for layer, row in work.items()}
    for layer, row in work.items():
        others = [o for o in work if o > layer and (layer, o) not in apart and work[o].shape == row.shape]
        at_once = max(1, _ELEMENTS_AT_ONCE // max(row.numel(), 1))
        for start in range(0, len(others), at_once):
            part = others[start : start + at_once]
            between = _entropy((torch.stack([work[o] for o in part]) + row) / 2)
            ends = (torch.stack([entropy[o] for o in part]) + entropy[layer]) / 2
            js = (between - ends).clamp(min=0).mean(-1).cpu()
            for other, value in zip(part, js, strict=True):
                found[:, layer, other] = found[:, other, layer] = value
    return found


def _entropy(row: Tensor) -> Tensor:
    return -torch.xlogy(row, row).sum(-1)


def concentration(rows: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """How one layer attends to an image.

    Visual keys are ranked as a plan ranks them: by the mean over query heads.

    Args:
        rows: ``[batch, heads, keys]``.
        visual: bool ``[batch, keys]``. Batch rows without visual keys are left out: their number is ``n`` less.

    Returns:
        float64 ``[n]``: the share of the row that falls on visual keys; float64 ``[m, len(MASSES)]``: the smallest
        share of the visual keys that holds so much of it, for the ``m`` batch rows that attend to them at all.
    """
    mean = rows.double().mean(1).cpu()
    masses, shares = [], []
    for row, seen in zip(mean, visual.cpu(), strict=True):
        if seen.any():
            masses.append(row[seen].sum())
            if masses[-1] > 0:
                shares.append(share_holding(row[seen]))
    none = torch.zeros(0, len(MASSES), dtype=torch.float64, device="cpu")
    return torch.stack(masses) if masses else none[:, 0], torch.stack(shares) if shares else none


def share_holding(scores: Tensor) -> Tensor:
    """The smallest share of the keys that holds each of `MASSES` of ``scores``, float64 ``[len(MASSES)]``.

    Args:
        scores: float64 ``[keys]``, at least one above 0, none negative.
    """
    held = scores.sort(descending=True).values.cumsum(0)
    wanted = torch.tensor(MASSES, dtype=torch.float64, device="cpu") * held[-1]
    # A sum that reaches a mass exactly, but for its rounding, holds it.
    missing = (held[None, :] < wanted[:, None] * (1 - 1e-9)).sum(1)
    return (missing + 1).double() / len(scores)
