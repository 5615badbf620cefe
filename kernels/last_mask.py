"""What the mask of a prompt's last query says of the keys."""

import torch
from torch import Tensor

__all__ = ["seen_keys", "weighs_keys"]


def seen_keys(last_mask: Tensor, keys: int) -> Tensor:
    """bool ``[batch or 1, keys]``: what the last query sees, through all heads.

    Args:
        last_mask: ``[batch or 1, heads or 1, keys or more]``, boolean or additive; an additive entry below half of its
            dtype's lowest value hides.
        keys: how many are in the cache.
    """
    seen = last_mask if last_mask.dtype == torch.bool else last_mask > _hidden(last_mask)
    return seen.all(1)[:, :keys]


def weighs_keys(last_mask: Tensor, keys: int) -> bool:
    """Whether an additive mask is more than a choice of keys: a position bias such as ALiBi. Arguments as above."""
    if last_mask.dtype == torch.bool:
        return False
    last_mask = last_mask[..., :keys]
    return not bool(((last_mask == 0) | (last_mask <= _hidden(last_mask))).all())


def _hidden(mask: Tensor) -> float:
    return torch.finfo(mask.dtype).min / 2
