"""Confidence intervals of averages, without assumptions about how scores are spread."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Interval", "mean_interval"]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An average and its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of ``values`` and its percentile bootstrap interval (Efron, 1979).

    Args:
        values: one number a sample.
        groups: what samples depend on each other, such as the picture that they ask about: groups are drawn, not
            samples. Without it every sample is its own group.
        resamples: how often.
        seed: of the draws; equal arguments give equal intervals.
    """
    if not values:
        raise ValueError("there are no values to average")
    numbers: dict[Hashable, int] = {}
    member = torch.tensor(
        [numbers.setdefault(g, len(numbers)) for g in (groups or range(len(values)))], dtype=torch.int64, device="cpu"
    )
    scores = torch.tensor(values, dtype=torch.float64, device="cpu")
    count = len(numbers)
    totals = torch.zeros(count, dtype=torch.float64, device="cpu").index_add_(0, member, scores)
    sizes = torch.zeros(count, dtype=torch.float64, device="cpu").index_add_(0, member, torch.ones_like(scores))
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.float64, device="cpu")
    for number in range(resamples):
        drawn = torch.randint(count, (count,), generator=generator, dtype=torch.int64, device="cpu")
        means[number] = totals[drawn].sum() / sizes[drawn].sum()
    edge = (1 - LEVEL) / 2
    low, high = means.quantile(torch.tensor([edge, 1 - edge], dtype=torch.float64, device="cpu")).tolist()
    return Interval(scores.mean().item(), low, high)
