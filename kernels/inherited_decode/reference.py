"""The obvious implementations: explicit logits, explicit softmax, every batch row by itself."""

import torch
from torch import Tensor

from avl_fx.kernels.partitioned_decode.capacity import with_spare_row
from avl_fx.kernels.partitioned_decode.reference import partitioned_decode_reference

__all__ = ["anchor_decode_reference", "inherited_decode_reference"]


def anchor_decode_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `avl::anchor_decode`; see the schema for shapes."""
    out, weights = partitioned_decode_reference(query, key, value, new_key, new_value, mask, segments, weigh, scale)
    key = key if new_key is None else with_spare_row(key)
    return out, weights, own_logits(query, key, mask, segments, scale)


def own_logits(query: Tensor, key: Tensor, mask: Tensor | None, segments: Tensor | None, scale: float) -> Tensor:
    """float32 ``[batch, heads, keys]``: -inf for keys that are not read or that the mask hides."""
    group = query.shape[1] // key.shape[1]
    logits = torch.einsum("bhid,bhjd->bhj", query.float(), key.float().repeat_interleave(group, 1)) * scale
    if mask is not None:
        full = mask.expand(*logits.shape[:2], 1, logits.shape[2]).squeeze(2)
        hidden = ~full if full.dtype == torch.bool else full == -torch.inf
        bias = torch.zeros_like(logits) if full.dtype == torch.bool else full.float().masked_fill(hidden, 0.0)
        logits = (logits + bias.clamp(min=torch.finfo(torch.float32).min)).masked_fill(hidden, -torch.inf)
    return logits.masked_fill(~named(segments, logits.shape[0], logits.shape[2], logits.device)[:, None], -torch.inf)


def named(ranges: Tensor | None, batch: int, keys: int, device: torch.device) -> Tensor:
    """bool ``[batch, keys]``: the keys in ``ranges``, all of them where there are none."""
    if ranges is None:
        return torch.ones(batch, keys, dtype=torch.bool, device=device)
    positions = torch.arange(keys, device=device)
    start, length = ranges[:, :, None, 0], ranges[:, :, None, 1]
    return ((positions >= start) & (positions - start < length)).any(1)


def every_key(key: Tensor, anchor_key: Tensor | None, inherited: Tensor | None, keys: int) -> Tensor:
    """``[batch, kv_heads, keys, head_dim]``: the key that belongs to each value; where none does, anything.

    Args:
        key: those of the layer, ``[batch, kv_heads, rows, head_dim]``, without the first inherited ones.
        anchor_key: takes their place wherever they are inherited; it may lack the newest row.
        inherited: ranges int64 ``[batch, T, 2]``.
        keys: values.
    """
    batch, kv_heads, rows, head_dim = key.shape
    theirs = named(inherited, batch, keys, key.device)
    earlier = theirs.cumsum(1) - theirs.long()
    own = torch.arange(keys, device=key.device) - earlier.clamp(max=keys - rows)
    index = own.clamp(0, rows)[:, None, :, None].expand(-1, kv_heads, -1, head_dim)
    found = torch.nn.functional.pad(key, (0, 0, 0, 1)).gather(2, index)
    if anchor_key is not None:
        there = anchor_key.shape[2]
        found[:, :, :there] = torch.where(theirs[:, None, :there, None], anchor_key, found[:, :, :there])
    return found


def inherited_decode_reference(
    logits: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    inherited: Tensor | None,
    scale: float,
    anchor_key: Tensor | None = None,
) -> Tensor:
    """Reference of `avl::inherited_decode`; see the schema for shapes. Accumulates in float32, or float64."""
    if new_value is not None:
        value = with_spare_row(value)
        value[:, :, -1:] = new_value
    if key is not None and new_key is not None:
        key = with_spare_row(key)
        key[:, :, -1:] = new_key
    batch, kv_heads, keys, _ = value.shape
    work = torch.float64 if value.dtype == torch.float64 else torch.float32
    if query is not None and key is not None:
        own = own_logits(query, every_key(key, anchor_key, inherited, keys), mask, None, scale)
        theirs = named(inherited, batch, keys, value.device)[:, None]
        logits = own if logits is None else torch.where(theirs, logits, own)
    assert logits is not None
    heads = logits.shape[1]
    group = heads // kv_heads
    out = value.new_zeros(batch, heads, 1, value.shape[-1])
    read = named(segments, batch, keys, value.device)
    visible = None if mask is None else mask.expand(batch, heads, 1, keys).squeeze(2)
    if visible is not None and visible.dtype != torch.bool:
        visible = visible != -torch.inf
    for row in range(batch):
        for head in range(heads):
            seen = read[row] if visible is None else read[row] & visible[row, head]
            seen = seen & (logits[row, head] != -torch.inf)
            if seen.any():
                probabilities = torch.softmax(logits[row, head, seen].to(work), dim=0)
                out[row, head, 0] = (probabilities @ value[row, head // group, seen].to(work)).to(value.dtype)
    return out
