"""The obvious implementation: every batch row by itself, explicit softmax over the keys that it reads."""

import torch
from torch import Tensor

from avl_fx.kernels.partitioned_decode.capacity import with_spare_row


def partitioned_decode_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Reference of `avl::partitioned_decode`; see the schema for shapes.

    Accumulates in float32, or in float64 when the query is float64. The weights are filled whatever
    ``weigh`` says, unless it is ``None``.
    """
    if new_key is not None and new_value is not None:
        key, value = with_spare_row(key), with_spare_row(value)
        key[:, :, -1:] = new_key
        value[:, :, -1:] = new_value
    batch, kv_heads, keys, _ = key.shape
    heads = query.shape[1]
    groups = heads // kv_heads
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(batch, heads, 1, value.shape[-1])
    weights = torch.zeros(batch, kv_heads, keys, dtype=torch.float32, device=query.device)
    positions = torch.arange(keys, device=query.device)
    full = None if mask is None else mask.expand(batch, heads, 1, keys)
    for row in range(batch):
        pairs = [(0, keys)] if segments is None else segments[row].tolist()
        ranges = [positions[start : start + length] for start, length in pairs]
        read = torch.cat([positions[:0], *ranges])
        for head in range(heads):
            seen, bias = read, torch.zeros((), dtype=work, device=query.device)
            if full is not None:
                hides = full[row, head, 0, read]
                hides = hides if hides.dtype == torch.bool else hides.to(work)
                visible = hides if hides.dtype == torch.bool else hides != float("-inf")
                seen = read[visible]
                bias = bias if hides.dtype == torch.bool else hides[visible]
            if len(seen) == 0:
                continue
            shared = head // groups
            logits = key[row, shared, seen].to(work) @ query[row, head, 0].to(work) * scale + bias
            probabilities = torch.softmax(logits, dim=0)
            out[row, head, 0] = (probabilities @ value[row, shared, seen].to(work)).to(query.dtype)
            weights[row, shared, seen] += (probabilities / groups).float()
    return out, weights[..., :0] if weigh is None else weights
