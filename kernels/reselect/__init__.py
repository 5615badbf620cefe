"""Core is picked anew among secondary: the rows that change places, for several layers at once and without a wait."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avl_fx.kernels.reselect.reference import reselect_reference

__all__ = ["IMPLEMENTATIONS", "reselect", "reselect_reference"]


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from avl_fx.kernels.reselect.triton import reselect_triton

    with torch.cuda.device_of(args[0]):
        return reselect_triton(*args)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"cuda": _cuda}
"""Device type -> implementation; the reference serves all others. Triton is imported at the first call."""


def reselect(
    scores: Tensor, slots: Tensor, tokens: Tensor, core: Tensor, secondary: Tensor, width: int, most: int
) -> tuple[Tensor, Tensor]:
    """The best rows of secondary become core; equal scores go to the earlier token.

    Shapes: L layers, B batch rows, G 1 or the number of KV heads, N the most visual tokens of any batch row.

    Args:
        scores: float32 ``[L, B, G, keys]``, contiguous.
        slots: int64 ``[B, N]``: where the visual rows lie.
        tokens: int64 ``[L, B, G, N]``, contiguous: which token lies in which slot; brought up to date.
        core: int64 ``[B]``: rows of core, the first so many slots.
        secondary: int64 ``[B]``: rows to choose from.
        width: at least the largest of ``secondary``, at most N.
        most: at least so many rows as may enter core in any batch row; positive.

    Returns:
        ``(source, slots)`` int64 ``[L, B, G, 2 * most]``, for each layer as `avl::partition_` takes them. The n-th row
        that leaves and the n-th that enters, in order of their slots, change places. Unused entries have slot ``-1``:
        how many there are only the device knows.
    """
    implementation = IMPLEMENTATIONS.get(scores.device.type, reselect_reference)
    return implementation(scores, slots, tokens, core, secondary, width, most)
