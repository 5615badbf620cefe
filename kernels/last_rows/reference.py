"""The obvious implementation: one head of one batch row after the other."""

import torch
from torch import Tensor


def last_rows_reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    counted: Tensor | None,
    positions: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Reference of `avl::last_rows`; see the schema for shapes.

    Accumulates in float32, or in float64 when the query is float64.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    groups = heads // key.shape[1]
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    full = None if mask is None else mask.expand(batch, heads, queries, keys)
    rows = torch.zeros(batch, heads, keys, dtype=torch.float32, device=query.device)
    for row in range(batch):
        last = _last_real(counted, positions, batch, heads, queries, row)
        if last is None:
            continue
        for head in range(heads):
            logits = key[row, head // groups].to(work) @ query[row, head, last].to(work) * scale
            if is_causal:
                logits[last + 1 :] = float("-inf")
            if full is not None:
                bias = full[row, head, last]
                if bias.dtype == torch.bool:
                    logits = logits.masked_fill(~bias, float("-inf"))
                else:
                    logits = logits + bias.to(work)
            if not (logits == float("-inf")).all():
                rows[row, head] = torch.softmax(logits, dim=0).float()
    return rows


def _last_real(
    counted: Tensor | None, positions: Tensor | None, batch: int, heads: int, queries: int, row: int
) -> int | None:
    if counted is None:
        return queries - 1
    keys = counted.shape[-1]
    seen = counted.expand(batch, heads, queries, keys)[row, :, -1]
    if seen.dtype != torch.bool:
        seen = seen > torch.finfo(seen.dtype).min / 2
    visible = seen.any(dim=0).tolist()
    where = range(keys - queries, keys) if positions is None else positions.tolist()
    real = [i for i in range(queries) if 0 <= where[i] < keys and visible[where[i]]]
    return real[-1] if real else None
