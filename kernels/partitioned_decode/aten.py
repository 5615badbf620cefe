"""`avl::partitioned_decode` on a CPU without a C++ compiler: ATen on slices of the cache, without copies of them.

Neighbouring ranges are merged, and batch rows with the same ranges go together. One range is one call of ATen's flash
kernel on a slice, with the query heads of a group as the query rows of their key/value head: so it reads each key once
for all of them, where grouped heads make it read a key once for each (3 heads a group, 3,520 keys, 1 thread: 1.6 ms
grouped, 1.1 ms packed). Several ranges are products of slices, packed in the same way, with one softmax over all of
them. Half precision has no product that accumulates and returns float32, so there the slices are brought together for
the flash kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from avl_fx.kernels.partitioned_decode.capacity import with_spare_row

Range = tuple[int, int]
"""First key, and one behind the last."""


def partitioned_decode_aten(
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
    """`avl::partitioned_decode` on CPU; see the schema for shapes."""
    if new_key is not None and new_value is not None:
        key, value = with_spare_row(key), with_spare_row(value)
        key.narrow(2, key.shape[2] - 1, 1).copy_(new_key)
        value.narrow(2, value.shape[2] - 1, 1).copy_(new_value)
    batch, kv_heads, keys, _ = key.shape
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        mask = mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, 1, keys)))
    weights = torch.empty(batch, kv_heads, 0 if weigh is None else keys, dtype=torch.float32, device="cpu")
    wanted = weigh is not None and bool(weigh)
    rows = [[(0, keys)]] * batch if segments is None else segments.tolist()
    runs = _runs([_merged(row, keys) for row in rows])
    if len(runs) == 1:
        return _attend(query, key, value, mask, runs[0][2], scale, weights.zero_() if wanted else None), weights
    outs = []
    for first, end, ranges in runs:
        part = slice(first, end)
        hidden = mask if mask is None or mask.shape[0] == 1 else mask[part]
        target = weights[part].zero_() if wanted else None
        outs.append(_attend(query[part], key[part], value[part], hidden, ranges, scale, target))
    return torch.cat(outs), weights


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
    """Attention over the ranges, which hold for all rows; fills the weights, so far 0, if they are given."""
    if not ranges:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    hidden = None if mask is None else _taken(mask, ranges, 3)

    def attend(key: Tensor, value: Tensor) -> Tensor:
        if weights is None and (len(ranges) == 1 or query.dtype != torch.float32):
            return _fused(query, key, value, hidden, ranges, scale)
        return _products(query, key, value, hidden, ranges, scale, weights)

    out = attend(key, value)
    return attend(*_without_hidden(key, value, mask)) if mask is not None and out.isnan().any() else out


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ranges: list[Range],
    scale: float,
) -> Tensor:
    """One call of the flash kernel, which gives no weights. ``mask`` is for the keys of the ranges alone."""
    batch, heads = query.shape[:2]
    kv_heads = key.shape[1]
    key, value = _taken(key, ranges, 2), _taken(value, ranges, 2)
    if heads == kv_heads:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if batch * kv_heads < torch.get_num_threads():  # packed heads would leave threads without work
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    query, mask = _packed(query, kv_heads), None if mask is None else _packed(mask, kv_heads)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, 1, -1)


def _packed(tensor: Tensor, kv_heads: int) -> Tensor:
    """``[b, heads, 1, n]`` as ``[b, kv_heads, group, n]``; one head for all stays one."""
    batch, heads, _, n = tensor.shape
    return tensor if heads == 1 else tensor.view(batch, kv_heads, heads // kv_heads, n)


def _products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ranges: list[Range],
    scale: float,
    weights: Tensor | None,
) -> Tensor:
    """Products of slices in float32, one softmax over all of them. ``mask`` is for the keys of the ranges alone."""
    batch, heads, _, head_dim = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    if batch > 1 and not (_one_stride(key) and _one_stride(value)):
        masks = [None] * batch if mask is None else mask.expand(batch, -1, -1, -1).split(1)
        targets = [None] * batch if weights is None else weights.split(1)
        rows = zip(query.split(1), key.split(1), value.split(1), masks, targets, strict=True)
        return torch.cat([_products(q, k, v, hidden, ranges, scale, target) for q, k, v, hidden, target in rows])
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    columns = (query.float() * scale).view(batch * kv_heads, group, head_dim).transpose(1, 2)
    logits = torch.cat([torch.bmm(_slice(key, at), columns).transpose(1, 2) for at in ranges], dim=2)
    if mask is not None:
        by_head, mask = logits.view(batch, kv_heads, group, -1), _packed(mask, kv_heads)
        by_head = by_head.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else by_head + mask
        logits = by_head.flatten(0, 1)
    probabilities = torch.softmax(logits, dim=2)
    if mask is not None:
        probabilities.masked_fill_(logits.amax(dim=2, keepdim=True) == float("-inf"), 0.0)
    out, done = columns.new_zeros(batch * kv_heads, group, value.shape[2]), 0
    for start, end in ranges:
        part = probabilities.narrow(2, done, end - start)
        out.baddbmm_(part, _slice(value, (start, end)))
        if weights is not None:
            weights[:, :, start:end] = part.mean(dim=1).view(batch, kv_heads, -1)
        done += end - start
    return out.to(query.dtype).view(batch, heads, 1, -1)


def _one_stride(cache: Tensor) -> bool:
    """Whether batch and heads are one dimension in memory; a product of many matrices copies its operands otherwise."""
    return cache.stride(0) == cache.shape[1] * cache.stride(1)


def _slice(cache: Tensor, at: Range) -> Tensor:
    return cache.narrow(1, at[0], at[1] - at[0]).float()


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
