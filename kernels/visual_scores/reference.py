"""The obvious implementation: one query of one head after the other."""

import torch
from torch import Tensor


def visual_scores_reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
) -> Tensor:
    """Reference of `avl::visual_scores`; see the schema for shapes.

    Accumulates in float32, or in float64 when the query is float64.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    groups = heads // kv_heads
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    full = None if mask is None else mask.expand(batch, heads, queries, keys)
    where = range(keys - queries, keys) if positions is None else positions.tolist()
    scores = torch.zeros(batch, kv_heads, keys, dtype=torch.float32, device=query.device)
    for row in range(batch):
        if full is None:
            visible = [not is_causal or j < queries for j in range(keys)]
        else:
            last_query = full[row, :, -1]
            if last_query.dtype != torch.bool:
                last_query = last_query > torch.finfo(last_query.dtype).min / 2
            visible = last_query.any(dim=0).tolist()
        real = [i for i in range(queries) if 0 <= where[i] < keys and visible[where[i]]]
        scoring = real[-window:]
        for i in scoring:
            for head in range(heads):
                logits = key[row, head // groups].to(work) @ query[row, head, i].to(work) * scale
                if is_causal:
                    logits[i + 1 :] = float("-inf")
                if full is not None:
                    bias = full[row, head, i]
                    hidden = ~bias if bias.dtype == torch.bool else bias.to(work) == float("-inf")
                    logits = logits if bias.dtype == torch.bool else logits + bias.to(work)
                    logits = logits.masked_fill(hidden, float("-inf"))
                if (logits != float("-inf")).any():
                    weights = torch.softmax(logits, dim=0) / (groups * len(scoring))
                    scores[row, head // groups] += weights.float()
    return scores
