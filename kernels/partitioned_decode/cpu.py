"""CPU implementation of `avl::partitioned_decode`: ATen on slices of the cache, which copies no key and no value.

Neighbouring ranges are merged, and batch rows with the same ranges go together. One range is one call of ATen's flash
kernel on a slice, so that dense attention costs what `scaled_dot_product_attention` costs. Several ranges are products
of slices with one softmax over all of them: the query heads of a group are the rows of one matrix, which reads each key
once for the whole group. Half precision has no product that accumulates and returns float32, so there the slices are
brought together (a third of the cache, at most) for the flash kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from avl_fx.kernels.partitioned_decode.capacity import with_spare_row

Range = tuple[int, int]
"""First key, and one behind the last."""


def partitioned_decode_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor,
    weigh: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`avl::partitioned_decode` on CPU; see the schema for shapes."""
    if new_key is not None and new_value is not None:
        key, value = with_spare_row(key), with_spare_row(value)
        key[:, :, -1:].copy_(new_key)
        value[:, :, -1:].copy_(new_value)
    batch, kv_heads, keys, _ = key.shape
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        mask = mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, 1, keys)))
    weights = torch.empty(batch, kv_heads, keys)
    wanted = bool(weigh)
    outs = []
    for first, end, ranges in _runs([_merged(row, keys) for row in segments.tolist()]):
        rows = slice(first, end)
        hidden = mask if mask is None or mask.shape[0] == 1 else mask[rows]
        target = weights[rows].zero_() if wanted else None
        out = _attend(query[rows], key[rows], value[rows], hidden, ranges, scale, target)
        if hidden is not None and out.isnan().any():
            clean = _without_hidden(key[rows], value[rows], hidden)
            out = _attend(query[rows], *clean, hidden, ranges, scale, target)
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs), weights


def _merged(row: list[Range], keys: int) -> list[Range]:
    """The ranges that a batch row reads, ascending, clipped, without neighbours that touch."""
    merged: list[Range] = []
    for start, length in sorted(row):
        end = min(start + length, keys)
        if end <= start:
            continue
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return merged


def _runs(rows: list[list[Range]]) -> list[tuple[int, int, list[Range]]]:
    """Consecutive batch rows with the same ranges: first row, one behind the last, the ranges."""
    runs: list[tuple[int, int, list[Range]]] = []
    for number, ranges in enumerate(rows):
        first = runs.pop()[0] if runs and runs[-1][2] == ranges else number
        runs.append((first, number + 1, ranges))
    return runs


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ranges: list[Range],
    scale: float,
    weights: Tensor | None,
) -> Tensor:
    """Attention over the ranges, which hold for all rows; fills the weights if they are given."""
    if not ranges:
        return query.new_zeros(*query.shape[:-1], value.shape[-1])
    if weights is not None or (len(ranges) > 1 and query.dtype == torch.float32):
        return _products(query, key, value, mask, ranges, scale, weights)
    hidden = None if mask is None else _taken(mask, ranges, 3)
    key, value = _taken(key, ranges, 2), _taken(value, ranges, 2)
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=hidden, scale=scale, enable_gqa=gqa)


def _products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ranges: list[Range],
    scale: float,
    weights: Tensor | None,
) -> Tensor:
    """The same with explicit products in float32."""
    batch, heads, _, head_dim = query.shape
    if batch > 1 and not (_one_stride(key) and _one_stride(value)):
        masks = [None] * batch if mask is None else mask.expand(batch, -1, -1, -1).split(1)
        targets = [None] * batch if weights is None else weights.split(1)
        rows = zip(query.split(1), key.split(1), value.split(1), masks, targets, strict=True)
        return torch.cat([_products(q, k, v, hidden, ranges, scale, target) for q, k, v, hidden, target in rows])
    kv_heads, groups = key.shape[1], heads // key.shape[1]
    packed = (query.float() * scale).view(batch, kv_heads, groups, head_dim)
    logits = torch.cat([packed @ _slice(key, at).transpose(-1, -2) for at in ranges], dim=-1)
    if mask is not None:
        hidden = _taken(mask, ranges, 3)
        hidden = hidden.expand(-1, heads, -1, -1).unflatten(1, (kv_heads, groups)).squeeze(3)
        logits = logits.masked_fill(~hidden, float("-inf")) if hidden.dtype == torch.bool else logits + hidden
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    if mask is not None:
        probabilities.masked_fill_(logits.amax(dim=-1, keepdim=True) == float("-inf"), 0.0)
    parts = probabilities.split([end - start for start, end in ranges], dim=-1)
    out = parts[0] @ _slice(value, ranges[0])
    for part, at in zip(parts[1:], ranges[1:], strict=True):
        out += part @ _slice(value, at)
    if weights is not None:
        for part, (start, end) in zip(parts, ranges, strict=True):
            torch.mean(part, dim=2, out=weights[:, :, start:end])
    return out.to(query.dtype).view(batch, heads, 1, -1)


def _one_stride(cache: Tensor) -> bool:
    """Whether batch and heads are one dimension in memory; a product of many matrices copies its operands otherwise."""
    return cache.stride(0) == cache.shape[1] * cache.stride(1)


def _slice(cache: Tensor, at: Range) -> Tensor:
    return cache[:, :, at[0] : at[1]].float()


def _taken(tensor: Tensor, ranges: list[Range], dim: int) -> Tensor:
    """The ranges of one dimension together; a view where there is one range."""
    parts = [tensor.narrow(dim, start, end - start) for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _without_hidden(key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Copies with zeros in keys that the mask hides from all heads of their group: 0 * NaN would be NaN."""
    visible = mask if mask.dtype == torch.bool else mask != float("-inf")
    if visible.shape[1] != 1:
        visible = visible.unflatten(1, (key.shape[1], -1)).any(dim=2)
    hidden = ~visible.transpose(-1, -2)
    return key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
