"""`avl::anchor_decode` and `avl::inherited_decode` on a CPU without a C++ compiler: whole rows of logits, in ATen."""

import torch
from torch import Tensor

from avl_fx.kernels.inherited_decode.reference import every_key, named, own_logits
from avl_fx.kernels.partitioned_decode.aten import partitioned_decode_aten
from avl_fx.kernels.partitioned_decode.capacity import with_spare_row


def anchor_decode_aten(
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
    """`avl::anchor_decode` on CPU; see the schema for shapes."""
    out, weights = partitioned_decode_aten(query, key, value, new_key, new_value, mask, segments, weigh, scale)
    key = key if new_key is None else with_spare_row(key)
    return out, weights, own_logits(query, key, mask, segments, scale)


def inherited_decode_aten(
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
    """`avl::inherited_decode` on CPU; see the schema for shapes."""
    if new_value is not None:
        value = with_spare_row(value)
        value.narrow(2, value.shape[2] - 1, 1).copy_(new_value)
    if key is not None and new_key is not None:
        key = with_spare_row(key)
        key.narrow(2, key.shape[2] - 1, 1).copy_(new_key)
    batch, kv_heads, keys, value_dim = value.shape
    if query is not None and key is not None:
        own = own_logits(query, every_key(key, anchor_key, inherited, keys), mask, None, scale)
        theirs = named(inherited, batch, keys, value.device)[:, None]
        logits = own if logits is None else torch.where(theirs, logits, own)
    assert logits is not None
    heads = logits.shape[1]
    hidden = ~named(segments, batch, keys, value.device)[:, None].expand(batch, heads, keys)
    if mask is not None:
        full = mask.expand(batch, heads, 1, keys).squeeze(2)
        hidden = hidden | (~full if full.dtype == torch.bool else full == -torch.inf)
    hidden = hidden | (logits == -torch.inf)
    probabilities = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=2).masked_fill(hidden, 0.0)
    # 0 * NaN would be NaN: what no head of a group sees may hold anything.
    unseen = hidden.unflatten(1, (kv_heads, -1)).all(2)[..., None]
    rows = probabilities.unflatten(1, (kv_heads, -1)) @ value.float().masked_fill(unseen, 0.0)
    return rows.reshape(batch, heads, 1, value_dim).to(value.dtype)
