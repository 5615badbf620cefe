"""The obvious implementation: float32 accumulation, explicit softmax, explicit GQA."""

import torch
from torch import Tensor


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    """Reference of `avl::attention`; see the schema for shapes.

    Accumulates in float32, or in float64 when the query is float64. A row without any visible key gives zeros, as
    ``scaled_dot_product_attention`` does. A row whose keys or values are NaN gives NaN.
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(groups, dim=1).to(work)
    values = value.repeat_interleave(groups, dim=1).to(work)
    logits = query.to(work) @ keys.transpose(-1, -2) * scale
    if is_causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), float("-inf"))
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(work)
    hidden = (logits == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(logits, dim=-1).masked_fill(hidden, 0.0)
    return (weights @ values).to(query.dtype)
