"""How far two runs of one model are apart."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["largest_difference"]


def largest_difference(left: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    """Largest absolute difference of any pair; both runs are of one length.

    NaN, which passes no comparison, where anything is not a number: Python's `max` would go over it behind the first.
    """
    pairs = zip(left, right, strict=True)
    return torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max().item()
