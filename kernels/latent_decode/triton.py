"""Triton implementation of `avl::latent_decode` for CUDA and ROCm: split-KV flash decoding over ranges of latents.

One program has a tile of heads and a split of what its batch row reads, as in `avl::partitioned_decode`, whose kernels
join the splits and make the weights. All heads share keys and values, and a tile of latents is both: it is loaded once
and multiplied twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from avl_fx.kernels.partitioned_decode.capacity import with_spare_row
from avl_fx.kernels.partitioned_decode.triton import (
    LN_2,
    LOG2_E,
    _finished,
    _hides,
    _mask,
    _range,
    _share,
    _update,
    merge,
    ranges,
    weigh_keys,
)
from avl_fx.kernels.splits import split_count

__all__ = ["latent_decode_triton"]

ROWS_PER_SPLIT = 128
"""As many bytes as the keys and values that a split of `avl::partitioned_decode` has at least."""


@triton.jit(do_not_specialize=["keys"])
def attend_latents_kernel(
    query,
    latents,
    rotated,
    mask,
    segments,
    out,
    part_max,
    part_sum,
    lse,
    kept,
    keep_if,
    scale,
    keys,
    entries,
    query_batch,
    query_head,
    latents_batch,
    latents_row,
    rotated_batch,
    rotated_row,
    mask_batch,
    mask_head,
    mask_key,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    MASK: tl.constexpr,
    KEEP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Attention of a tile of heads over one split of what its batch row reads.

    ``KEEP``: logits go to ``kept``, [batch, heads, keys], in natural units, where ``keep_if`` says so. ``WHOLE``: there
    is one split, and ``out`` is the result instead of a part of it.
    """
    program = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    batch_row, block = program // blocks, program % blocks
    h, n = block * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    c, r = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    in_heads, in_rank, in_rope = h < HEADS, c < RANK, r < ROPE
    query += batch_row * query_batch + h[:, None] * query_head
    q_latent = tl.load(query + c[None, :], mask=in_heads[:, None] & in_rank[None, :], other=0.0)
    q_rotated = tl.load(query + RANK + r[None, :], mask=in_heads[:, None] & in_rope[None, :], other=0.0)
    latents += batch_row * latents_batch
    rotated += batch_row * rotated_batch
    if MASK != "none":
        mask += batch_row * mask_batch
    if KEEP:
        row_of = (batch_row * HEADS + h)[:, None] * keys
        keeps = in_heads[:, None] & (tl.load(keep_if) != 0)

    used, _, first, end = _share(segments, batch_row, keys, entries, split, splits, BLOCK_K, BLOCK_S)

    most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    sums = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    before = first * 0
    for number in range(used):
        begin, here = _range(segments, batch_row, keys, entries, number)
        low, high = tl.maximum(first - before, 0), tl.minimum(end - before, here)
        for at in range(low, high, BLOCK_K):
            inside = at + n < high
            read = inside
            row = begin + at
            if MASK != "none":
                bias = _hides(mask, h, row + n, inside, mask_head, mask_key, HEADS, MASK)
                read = read & (tl.max(bias, axis=0) != float("-inf"))
            at_latent = latents + row * latents_row + n[:, None] * latents_row + c[None, :]
            at_rotated = rotated + row * rotated_row + n[:, None] * rotated_row + r[None, :]
            x = tl.load(at_latent, mask=read[:, None] & in_rank[None, :], other=0.0)
            k = tl.load(at_rotated, mask=read[:, None] & in_rope[None, :], other=0.0)
            logits = tl.dot(q_latent, tl.trans(x), input_precision="ieee")
            logits = tl.dot(q_rotated, tl.trans(k), logits, input_precision="ieee") * (scale * LOG2_E)
            if MASK != "none":
                logits = tl.where(bias == float("-inf"), float("-inf"), logits + bias)
            logits = tl.where(read[None, :], logits, float("-inf"))
            if KEEP:
                tl.store(kept + row_of + (row + n)[None, :], logits * LN_2, mask=keeps & inside[None, :])
            p, factor, most, total = _update(logits, most, total)
            sums = tl.dot(p.to(x.dtype), x, sums * factor[:, None], input_precision="ieee")
        before += here

    in_out = in_heads[:, None] & in_rank[None, :]
    if WHOLE:
        result, norm = _finished(sums, most, total)
        at_head = batch_row * HEADS + h
        tl.store(out + at_head[:, None] * RANK + c[None, :], result.to(out.dtype.element_ty), mask=in_out)
        tl.store(lse + at_head, norm, mask=in_heads)
    else:
        part = (batch_row * splits + split) * HEADS + h
        tl.store(part_max + part, most, mask=in_heads)
        tl.store(part_sum + part, total, mask=in_heads)
        tl.store(out + part[:, None] * RANK + c[None, :], sums, mask=in_out)


def latent_decode_triton(
    query: Tensor,
    latents: Tensor,
    rotated: Tensor,
    new_latents: Tensor | None,
    new_rotated: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`avl::latent_decode` on CUDA and ROCm; see the schema for shapes."""
    batch, heads = query.shape[:2]
    if new_latents is not None and new_rotated is not None:
        latents, rotated = with_spare_row(latents), with_spare_row(rotated)
        # Within the kernel this would take registers that the sums need.
        latents.narrow(2, latents.shape[2] - 1, 1).copy_(new_latents)
        rotated.narrow(2, rotated.shape[2] - 1, 1).copy_(new_rotated)
    keys, rank, rope = latents.shape[2], latents.shape[3], rotated.shape[3]
    segments = ranges(segments, query, keys)
    query = query if query.stride(3) == 1 else query.contiguous()
    kind, mask, mask_strides = _mask(mask, (batch, heads, 1, keys))
    sizes = tile(query.dtype, rank)
    programs = batch * triton.cdiv(heads, sizes["BLOCK_H"])
    splits = split_count(programs, keys, query.device, ROWS_PER_SPLIT)

    out = query.new_empty(batch, heads, 1, rank)
    weights = query.new_empty(batch, 1, 0 if weigh is None else keys, dtype=torch.float32)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    kept = None if weigh is None else query.new_empty(batch, heads, keys, dtype=torch.float32)
    parts, part_max, part_sum = out, None, None
    if splits > 1:
        parts = query.new_empty(batch, splits, heads, rank, dtype=torch.float32)
        part_max, part_sum = query.new_empty(2, batch, splits, heads, dtype=torch.float32)
    attend_latents_kernel[(programs, splits)](
        query,
        latents,
        rotated,
        mask,
        segments,
        parts,
        part_max,
        part_sum,
        lse,
        kept,
        weigh,
        scale,
        keys,
        segments.shape[1],
        *query.stride()[:2],
        latents.stride(0),
        latents.stride(2),
        rotated.stride(0),
        rotated.stride(2),
        *mask_strides,
        HEADS=heads,
        RANK=rank,
        ROPE=rope,
        MASK=kind,
        KEEP=weigh is not None,
        WHOLE=splits == 1,
        BLOCK_P=max(16, triton.next_power_of_2(rope)),
        BLOCK_S=triton.next_power_of_2(max(1, segments.shape[1])),
        **sizes,
    )
    if part_max is not None and part_sum is not None:
        merge(parts, part_max, part_sum, out, lse)
    if kept is not None and weigh is not None:
        weigh_keys(kept, segments, weigh, lse, weights)
    return out, weights


def tile(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """Sizes of a tile and of the program that computes it: the largest tile of keys that fits into registers.

    Args:
        dtype: of query, latents and rotated keys.
        rank: of the latents.
    """
    wide = max(16, triton.next_power_of_2(rank))
    few = dtype == torch.float32 or torch.version.hip is not None
    # With more warps a program of ROCm has fewer registers.
    warps = 8 if wide > 256 and torch.version.hip is None else 4
    sizes = {"BLOCK_H": 16, "BLOCK_K": 16 if few else 32, "BLOCK_R": wide, "num_warps": warps}
    # Three stages of float32 take more shared memory than an sm_86 or sm_89 has.
    return {**sizes, "num_stages": 2} if dtype == torch.float32 else sizes
