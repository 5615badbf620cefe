"""Which queries of a prompt score: as tensors, so that no size depends on data and no device has to be waited for."""

import torch
from torch import Tensor

__all__ = ["scoring_rows"]


def scoring_rows(
    query: Tensor, key: Tensor, mask: Tensor | None, positions: Tensor | None, is_causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Indices of the last real queries, the newest first; see the schema for what is real.

    Returns:
        int64 ``[batch, W]`` with W = ``min(window, queries)``, 0 where a batch row has fewer; and bool ``[batch, W]``,
        False there.
    """
    batch, queries, keys, device = query.shape[0], query.shape[2], key.shape[2], query.device
    index = torch.arange(keys, device=device)
    if mask is not None:
        row = mask[:, :, -1]
        row = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
        visible = row.any(dim=1).expand(batch, keys)
    else:
        visible = (index < (queries if is_causal else keys)).expand(batch, keys)
    if positions is None:
        positions = torch.arange(keys - queries, keys, device=device)
    last = torch.where(visible, index, -1).amax(dim=1, keepdim=True)
    at_visible = visible[:, positions.clamp(0, keys - 1)]
    real = at_visible & (positions >= 0) & (positions <= last)
    rows = torch.where(real, torch.arange(queries, device=device), -1).topk(min(window, queries)).values
    return rows.clamp(min=0), rows >= 0
