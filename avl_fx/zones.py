"""Which visual rows are core, secondary and minor, from what a prompt's last rows look at (A-VL, arXiv 2409.14846).

What is looked at last is not all that will be said: a prompt that asks for a description knows where it begins, not
where it leads. So part of secondary may be *spread* over the images instead, whatever its scores. The spread keys are
the first in a low-discrepancy order (Fibonacci hashing, Knuth, TAOCP vol. 3, 6.4): however many are taken, they lie
evenly, and each layer and KV head starts elsewhere, so that together they see everything.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["spread_order", "spread_out", "zones"]

_GOLDEN = 2654435769
"""2**32 over the golden ratio, odd."""
_BY_LAYER = 3242174889
"""2**32 over the plastic number, odd: offsets of layers do not meet the steps of keys."""
_BY_HEAD = 2447445414
"""2**32 over its square: those of heads meet neither."""
_MASK = 2**32 - 1


def spread_order(tokens: Tensor, layers: Sequence[int]) -> Tensor:
    """In which order keys are taken that are spread; int64, the smallest first, each number once up to 2**32 keys.

    Args:
        tokens: int64 ``[layers, B, G, N]``: each key's number among the visual keys of its batch row, from 0.
        layers: the decoder layers.
    """
    layer = torch.tensor(layers, dtype=torch.int64, device=tokens.device)[:, None, None, None]
    head = torch.arange(tokens.shape[2], device=tokens.device)[:, None]
    return ((tokens + 1) * _GOLDEN + layer * _BY_LAYER + head * _BY_HEAD) & _MASK


def spread_out(scores: Tensor, secondary: Tensor, spread: float, order: Tensor) -> Tensor:
    """``scores`` with ``-inf`` for the rows that are not secondary, where a share of secondary is spread.

    The best of each batch row are secondary, but for the last ``int(spread * secondary)``: these are the first in
    ``order`` of what is left. Equal scores go to the earlier row.

    Args:
        scores: ``[layers, B, G, N]``; ``-inf`` where there is no row, below 0 where nothing may be spread.
        secondary: int64 ``[B]``: how many.
        spread: share of secondary that is not chosen by its scores.
        order: int64, the shape of ``scores``: `spread_order`.
    """
    secondary = secondary[:, None, None]
    chosen = secondary - (secondary.double() * spread).long()
    best = _ranks(scores, descending=True) < chosen
    order = order.masked_fill(scores < 0, _MASK + 1).masked_fill(best, -1)
    return scores.masked_fill(_ranks(order) >= secondary, -torch.inf)


def zones(scores: Tensor, core: Tensor, secondary: Tensor) -> Tensor:
    """0 for the rows of core, 1 for the rest of secondary, 2 for minor; int64, the shape of ``scores``.

    The best of each batch row are core, the next best the rest of secondary. Equal scores go to the earlier row.

    Args:
        scores: ``[layers, B, G, N]``; ``-inf`` where there is no row.
        core: int64 ``[B]``: how many.
        secondary: int64 ``[B]``: how many, core among them.
    """
    rank = _ranks(scores, descending=True)
    return (rank >= core[:, None, None]).long() + (rank >= secondary[:, None, None]).long()


def _ranks(values: Tensor, descending: bool = False) -> Tensor:
    """How many come before each, of equal ones the earlier; along the last dimension."""
    return values.argsort(dim=-1, descending=descending, stable=True).argsort(-1)
