"""`avl::last_rows` by tensor operators, for every device: one query is gathered first, the rest is a small product."""

import torch
from torch import Tensor


def last_rows_aten(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    counted: Tensor | None,
    positions: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """`avl::last_rows`; see the schema for shapes."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    index = _last_real(query, counted, positions)
    at = index.clamp(min=0)
    chosen = query[torch.arange(batch, device=query.device), :, at].to(work) * scale
    packed = chosen.view(batch, kv_heads, heads // kv_heads, head_dim)
    logits = (packed @ key.to(work).transpose(-1, -2)).view(batch, heads, keys)
    if is_causal:
        logits.masked_fill_(torch.arange(keys, device=query.device) > at[:, None, None], float("-inf"))
    if mask is not None:
        bias = _rank_4(mask)
        bias = bias.expand(batch, bias.shape[1], queries, keys)
        bias = bias[torch.arange(batch, device=query.device), :, at]
        if bias.dtype == torch.bool:
            logits.masked_fill_(~bias, float("-inf"))
        else:
            logits += bias.to(work)
    seen = (logits.amax(dim=-1, keepdim=True) != float("-inf")) & (index >= 0)[:, None, None]
    return torch.softmax(logits, dim=-1).masked_fill(~seen, 0.0).float()


def _last_real(query: Tensor, counted: Tensor | None, positions: Tensor | None) -> Tensor:
    """int64 ``[batch]``: the index of the last real query, ``-1`` where there is none."""
    batch, queries, device = query.shape[0], query.shape[2], query.device
    index = torch.arange(queries, device=device)
    if counted is None:
        return index[-1:].expand(batch)
    last = _rank_4(counted)[:, :, -1]
    if last.dtype != torch.bool:
        last = last > torch.finfo(last.dtype).min / 2
    keys = last.shape[-1]
    visible = last.any(dim=1).expand(batch, keys)
    if positions is None:
        positions = torch.arange(keys - queries, keys, device=device)
    real = visible[:, positions.clamp(0, keys - 1)] & (positions >= 0) & (positions < keys)
    return torch.where(real, index, -1).amax(dim=1)


def _rank_4(mask: Tensor) -> Tensor:
    while mask.dim() < 4:
        mask = mask[None]
    return mask
