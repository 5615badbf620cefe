"""A stand-in for FlashAttention, which needs a GPU: its operator by its name and signature, and what is built on it.

`flash_attn_func` calls the operator from inside an autograd function, as the library does (version 2.7 and later).
`as_in_transformers` is what transformers make of it: which rows are padded, and whether several sequences are packed
into one, is read from tensors while the model runs.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "standin/flash-attn"
"""Named like a kernel of a hub."""


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result, log-sum-exp, dropout mask and random state; q [B, Q, H, D], k and v [B, K, KV, D]. Slow and obvious."""
    assert dropout_p == 0.0
    groups, queries, keys = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * softmax_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    row = torch.arange(queries, device=q.device)[:, None] + keys - queries
    distance = torch.arange(keys, device=q.device) - row
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.view(-1, 1, 1) * distance.abs()
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal or window_size_right >= 0:
        hidden |= distance > (0 if causal else window_size_right)
    if window_size_left >= 0:
        hidden |= distance < -window_size_left
    logits = logits.masked_fill(hidden, -torch.inf)
    result = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(logits, -1).nan_to_num(0.0), v.double()).to(q.dtype)
    return result, logits.logsumexp(-1).float(), q.new_empty(0), torch.empty(2, dtype=torch.int64)


@forward.register_fake
def _(q: Tensor, *others: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, return_lse):
        result, lse, _, _ = torch.ops.flash_attn._flash_attn_forward(
            q,
            k,
            v,
            0.0,
            q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            causal=causal,
            window_size_left=window_size[0],
            window_size_right=window_size[1],
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            return_softmax=False,
        )
        return (result, lse) if return_lse else result


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As the library's, without dropout."""
    return _FlashAttention.apply(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, return_lse)


def _attend(module, query, key, value, attention_mask, scaling=None, is_causal=None, position_ids=None, **kwargs):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:
        if position_ids is not None and query.shape[0] == 1 < query.shape[2]:
            places = torch.arange(query.shape[2]) + position_ids.min()
            assert not (places - position_ids).abs().sum().bool(), "packed sequences"
        return flash_attn_func(q, k, v, scaling, causal), None
    result = torch.zeros_like(q)
    for row, seen in enumerate(attention_mask.bool()):
        asked = seen[-q.shape[1] :]
        packed = flash_attn_func(q[row][asked][None], k[row][seen][None], v[row][seen][None], scaling, causal)
        result[row, asked] = packed[0]
    return result, None


def _mask(batch_size, q_length, kv_length, attention_mask=None, **kwargs):
    """``None`` where nothing is padded, which only the mask's elements tell."""
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:]
        if attention_mask.all():
            attention_mask = None
    return attention_mask


def as_in_transformers() -> str:
    """Make the stand-in known to transformers; returns its name."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME
