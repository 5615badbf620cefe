"""Triton implementations of `avl::anchor_decode` and `avl::inherited_decode` for CUDA and ROCm.

The anchor's is that of `avl::partitioned_decode`, which writes its logits out. A lazy layer's is built alike: one
program for each key/value head and split, and the same joining of splits. Its tiles of logits are loaded; products with
keys are made in tiles that hold a key whose logit is not inherited, and with the anchor's keys where those are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from avl_fx.kernels.partitioned_decode.capacity import with_spare_row
from avl_fx.kernels.partitioned_decode.triton import (
    LOG2_E,
    _extent,
    _hides,
    _logits,
    _mask,
    _range,
    _share,
    _update,
    merge,
    partitioned_decode_triton,
    ranges,
    tile,
)
from avl_fx.kernels.splits import split_count

__all__ = ["anchor_decode_triton", "inherited_decode_triton"]


def anchor_decode_triton(
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
    """`avl::anchor_decode` on CUDA and ROCm; see the schema for shapes."""
    seen = key.shape[2] + (new_key is not None)
    kept = query.new_full((query.shape[0], query.shape[1], seen), -torch.inf, dtype=torch.float32)
    arguments = query, key, value, new_key, new_value, mask, segments, weigh, scale
    return (*partitioned_decode_triton(*arguments, kept=kept), kept)


@triton.jit(do_not_specialize=["keys", "anchor_keys", "left_out"])
def inherit_kernel(
    inherited_logits,
    query,
    key,
    value,
    mask,
    segments,
    inherited,
    anchor_key,
    part_out,
    part_max,
    part_sum,
    scale,
    keys,
    anchor_keys,
    left_out,
    kv_heads,
    entries,
    inherited_entries,
    query_batch,
    query_head,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    mask_batch,
    mask_head,
    mask_key,
    anchor_batch,
    anchor_head,
    anchor_row,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    OWN: tl.constexpr,
    ANCHOR: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Attention of one group of heads over one split of what its batch row reads; ``OWN``: not all is inherited;
    ``ANCHOR``: keys are, and not logits."""
    program = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch_row, kv_head = program // kv_heads, program % kv_heads
    g, n, d, v = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    head = kv_head * GROUP + g
    value += batch_row * value_batch + kv_head * value_head
    if ANCHOR:
        anchor_key += batch_row * anchor_batch + kv_head * anchor_head
    else:
        inherited_logits += program * GROUP * keys
    if MASK != "none":
        mask += batch_row * mask_batch + kv_head * GROUP * mask_head
    if OWN:
        in_query = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        q = tl.load(query + batch_row * query_batch + head[:, None] * query_head + d[None, :], mask=in_query, other=0.0)
        key += batch_row * key_batch + kv_head * key_head
        their_used, _ = _extent(inherited, batch_row, anchor_keys, inherited_entries, BLOCK_I)

    used, _, first, end = _share(segments, batch_row, keys, entries, split, splits, BLOCK_K, BLOCK_S)

    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    before = first * 0
    for number in range(used):
        begin, here = _range(segments, batch_row, keys, entries, number)
        low, high = tl.maximum(first - before, 0), tl.minimum(end - before, here)
        for at in range(low, high, BLOCK_K):
            read = at + n < high
            position = begin + at + n
            if MASK != "none":
                bias = _hides(mask, g, position, read, mask_head, mask_key, GROUP, MASK)
                read = read & (tl.max(bias, axis=0) != float("-inf"))
            if OWN:
                # How far each key is behind the start of each inherited range: inside it, it is inherited.
                is_theirs, earlier = position < 0, position * 0
                for theirs in range(their_used):
                    their_start, their_length = _range(inherited, batch_row, anchor_keys, inherited_entries, theirs)
                    behind_start = position - their_start
                    is_theirs = is_theirs | ((behind_start >= 0) & (behind_start < their_length))
                    earlier += tl.minimum(tl.maximum(behind_start, 0), their_length)
                row = position - tl.minimum(earlier, left_out)
                in_key = (read & (is_theirs == 0))[:, None] & (d < HEAD_DIM)[None, :]
                k = tl.load(key + row[:, None] * key_row + d[None, :], mask=in_key, other=0.0)
                if ANCHOR:
                    in_anchor = (read & is_theirs)[:, None] & (d < HEAD_DIM)[None, :]
                    their_key = anchor_key + position[:, None] * anchor_row + d[None, :]
                    k = tl.where(is_theirs[:, None], tl.load(their_key, mask=in_anchor, other=0.0), k)
                logits = _logits(q, k, scale, BLOCK_G)
                if MASK != "none":
                    logits = logits + bias
            if not ANCHOR:
                in_logits = (g < GROUP)[:, None] & read[None, :]
                if OWN:
                    in_logits = in_logits & is_theirs[None, :]
                at_logits = inherited_logits + g.to(tl.int64)[:, None] * keys + position[None, :]
                given = tl.load(at_logits, mask=in_logits, other=float("-inf")) * LOG2_E
                logits = tl.where(is_theirs[None, :], given, logits) if OWN else given
            if MASK != "none":
                logits = tl.where(bias == float("-inf"), float("-inf"), logits)
            logits = tl.where(read[None, :], logits, float("-inf"))
            # What no head of the group sees may hold anything.
            read = read & (tl.max(tl.where((g < GROUP)[:, None], logits, float("-inf")), axis=0) != float("-inf"))
            p, factor, most, total = _update(logits, most, total)
            in_value = read[:, None] & (v < VALUE_DIM)[None, :]
            x = tl.load(value + position[:, None] * value_row + v[None, :], mask=in_value, other=0.0)
            if BLOCK_G == 1:
                product = tl.sum(tl.trans(p) * x.to(tl.float32), axis=0)[None, :]
            else:
                product = tl.dot(p.to(x.dtype), x, input_precision="ieee")
            sums = sums * factor[:, None] + product
        before += here

    part = (program * splits + split) * GROUP + g
    tl.store(part_max + part, most, mask=g < GROUP)
    tl.store(part_sum + part, total, mask=g < GROUP)
    in_out = (g < GROUP)[:, None] & (v < VALUE_DIM)[None, :]
    tl.store(part_out + part[:, None] * VALUE_DIM + v[None, :], sums, mask=in_out)


def inherited_decode_triton(
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
    """`avl::inherited_decode` on CUDA and ROCm; see the schema for shapes."""
    if new_value is not None:
        value = with_spare_row(value)
        value.narrow(2, value.shape[2] - 1, 1).copy_(new_value)
    if key is not None and new_key is not None:
        key = with_spare_row(key)
        key.narrow(2, key.shape[2] - 1, 1).copy_(new_key)
    batch, kv_heads, keys, value_dim = value.shape
    heads = (query if query is not None else logits).shape[1]  # type: ignore[union-attr]
    group = heads // kv_heads
    segments, logits = ranges(segments, value, keys), None if logits is None else logits.contiguous()
    query_strides: tuple[int, ...] = (0, 0)
    key_strides: tuple[int, ...] = (0, 0, 0)
    head_dim, left_out = 1, 0
    if query is not None and key is not None and inherited is not None:
        query = query if query.stride(3) == 1 else query.contiguous()
        query_strides, key_strides, head_dim = query.stride()[:2], key.stride()[:3], query.shape[3]
        inherited, left_out = inherited.contiguous(), keys - key.shape[2]
    kind, mask, mask_strides = _mask(mask, (batch, heads, 1, keys))
    splits = split_count(batch * kv_heads, keys, value.device)
    out = value.new_empty(batch, heads, 1, value_dim)
    lse = value.new_empty(batch, heads, dtype=torch.float32)
    part_out = value.new_empty(batch * kv_heads, splits, group, value_dim, dtype=torch.float32)
    part_max, part_sum = value.new_empty(2, batch * kv_heads, splits, group, dtype=torch.float32)
    inherit_kernel[(batch * kv_heads, splits)](
        logits,
        query,
        key,
        value,
        mask,
        segments,
        inherited,
        anchor_key,
        part_out,
        part_max,
        part_sum,
        scale,
        keys,
        keys if anchor_key is None else min(keys, anchor_key.shape[2]),
        left_out,
        kv_heads,
        segments.shape[1],
        0 if inherited is None else inherited.shape[1],
        *query_strides,
        *key_strides,
        *value.stride()[:3],
        *mask_strides,
        *((0, 0, 0) if anchor_key is None else anchor_key.stride()[:3]),
        GROUP=group,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        MASK=kind,
        OWN=query is not None,
        ANCHOR=anchor_key is not None,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_S=triton.next_power_of_2(max(1, segments.shape[1])),
        BLOCK_I=1 if inherited is None else triton.next_power_of_2(max(1, inherited.shape[1])),
        **_tile(value.dtype, group, max(head_dim, value_dim)),
    )
    merge(part_out, part_max, part_sum, out, lse)
    return out


def _tile(dtype: torch.dtype, group: int, dim: int) -> dict[str, int]:
    """Sizes of a tile; what loads logits besides is given the warps of what loads a mask."""
    return tile(dtype, group, "bool", dim) | {"BLOCK_G": 1 if group == 1 else max(16, triton.next_power_of_2(group))}
