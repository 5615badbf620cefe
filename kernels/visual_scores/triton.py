"""Triton implementation of `avl::visual_scores` for CUDA and ROCm.

The scoring queries of all heads of a group are the rows of one tile, so each key is read once for all of them, and
twice in all: `normalise_kernel` finds the sum of each softmax row, the keys being split between programs, and
`score_kernel` adds up the probabilities of each key. Which queries score is found by tensor operations on the device;
nothing waits for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from avl_fx.kernels.splits import split_count
from avl_fx.kernels.visual_scores.rows import scoring_rows

BLOCK_KEYS = 64
MAX_BLOCK_ROWS = 32
"""Sizes of one tile. With 64 rows of 128 dimensions and a mask, the registers of sm_100 do not suffice."""
WIDE = 512
"""Bytes of a query or key beyond which tiles are smaller."""

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-2e38)
"""Times LOG2_E it is still a float32; added to any logit it is all that is left."""


@triton.jit
def _tile(
    query,
    key,
    mask,
    rows,
    m,
    position,
    keys,
    scale,
    query_head,
    query_row,
    key_row,
    mask_head,
    mask_row,
    mask_key,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits ``[rows, keys]`` in units of log 2. Row ``m``: query ``m // GROUP`` of the window, head ``m % GROUP``."""
    d = tl.arange(0, BLOCK_D)
    inside = m < WINDOW * GROUP
    row = tl.load(rows + m // GROUP, mask=inside, other=0)
    at = query + (m % GROUP).to(tl.int64)[:, None] * query_head + row[:, None] * query_row + d[None, :]
    q = tl.load(at, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    stored = position < keys
    k = tl.load(
        key + position[:, None] * key_row + d[None, :], mask=stored[:, None] & (d < HEAD_DIM)[None, :], other=0.0
    )
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
    if MASK == "causal":
        logits = tl.where(position[None, :] <= row[:, None], logits, float("-inf"))
    if MASK == "bool" or MASK == "additive":
        at = (m % GROUP).to(tl.int64)[:, None] * mask_head + row[:, None] * mask_row + position[None, :] * mask_key
        within = inside[:, None] & stored[None, :]
        if MASK == "bool":
            logits = tl.where(tl.load(mask + at, mask=within, other=0) != 0, logits, float("-inf"))
        else:
            bias = tl.load(mask + at, mask=within, other=float("-inf")).to(tl.float32)
            # The lowest finite mask stays finite: a row of nothing else is uniform.
            bias = tl.where(bias == float("-inf"), bias, tl.maximum(bias, LOWEST) * LOG2_E)
            logits = tl.where(bias == float("-inf"), bias, logits + bias)
    return tl.where(stored[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["keys", "share"])
def normalise_kernel(
    query,
    key,
    mask,
    rows,
    part_max,
    part_sum,
    scale,
    keys,
    share,
    kv_heads,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_key,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Maximum and sum of some softmax rows over ``share`` keys."""
    program = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    b, h = program // kv_heads, program % kv_heads
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query += b * query_batch + h * GROUP * query_head
    key += b * key_batch + h * key_head
    if MASK == "bool" or MASK == "additive":
        mask += b * mask_batch + h * GROUP * mask_head
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = split * share
    for at in range(first, tl.minimum(first + share, keys), BLOCK_K):
        logits = _tile(
            query,
            key,
            mask,
            rows + b * WINDOW,
            m,
            at + tl.arange(0, BLOCK_K),
            keys,
            scale,
            query_head,
            query_row,
            key_row,
            mask_head,
            mask_row,
            mask_key,
            GROUP,
            HEAD_DIM,
            WINDOW,
            MASK,
            BLOCK_D,
        )
        new = tl.maximum(most, tl.max(logits, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(most - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        most = new
    part = (program * splits + split) * (WINDOW * GROUP) + m
    tl.store(part_max + part, most, mask=m < WINDOW * GROUP)
    tl.store(part_sum + part, total, mask=m < WINDOW * GROUP)


@triton.jit(do_not_specialize=["keys"])
def score_kernel(
    query,
    key,
    mask,
    rows,
    share_of_row,
    part_max,
    part_sum,
    scores,
    scale,
    keys,
    splits,
    kv_heads,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_key,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Probabilities of one tile of keys, summed over all scoring rows with the share of each."""
    program = tl.program_id(0).to(tl.int64)
    b, h = program // kv_heads, program % kv_heads
    position = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    query += b * query_batch + h * GROUP * query_head
    key += b * key_batch + h * key_head
    if MASK == "bool" or MASK == "additive":
        mask += b * mask_batch + h * GROUP * mask_head
    p = tl.arange(0, BLOCK_P)
    result = tl.zeros([BLOCK_K], tl.float32)
    for block in range(0, WINDOW * GROUP, BLOCK_M):
        m = block + tl.arange(0, BLOCK_M)
        inside = m < WINDOW * GROUP
        part = (program * splits + p[None, :]) * (WINDOW * GROUP) + m[:, None]
        in_part = inside[:, None] & (p < splits)[None, :]
        most = tl.load(part_max + part, mask=in_part, other=float("-inf"))
        sums = tl.load(part_sum + part, mask=in_part, other=0.0)
        base = tl.max(most, axis=1)
        base = tl.where(base == float("-inf"), 0.0, base)
        total = tl.sum(tl.exp2(most - base[:, None]) * sums, axis=1)
        share = tl.load(share_of_row + b * WINDOW + m // GROUP, mask=inside, other=0.0)
        logits = _tile(
            query,
            key,
            mask,
            rows + b * WINDOW,
            m,
            position,
            keys,
            scale,
            query_head,
            query_row,
            key_row,
            mask_head,
            mask_row,
            mask_key,
            GROUP,
            HEAD_DIM,
            WINDOW,
            MASK,
            BLOCK_D,
        )
        factor = share / tl.where(total == 0.0, 1.0, total)
        weights = tl.where((share > 0.0)[:, None], tl.exp2(logits - base[:, None]) * factor[:, None], 0.0)
        result += tl.sum(weights, axis=0)
    tl.store(scores + program * keys + position, result, mask=position < keys)


def visual_scores_triton(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
) -> Tensor:
    """`avl::visual_scores` on CUDA and ROCm; see the schema for shapes."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    query = query if query.stride(3) == 1 else query.contiguous()
    rows, real = scoring_rows(query, key, mask, positions, is_causal, window)
    rows, count = rows.contiguous(), rows.shape[1]
    share_of_row = real.to(torch.float32) / (group * real.sum(dim=1, keepdim=True).clamp(min=1))
    kind = "causal" if is_causal else "none"
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "additive"
        full = mask.expand(batch, heads, queries, keys)
        mask, mask_strides = full.view(torch.uint8) if kind == "bool" else full, full.stride()

    splits = split_count(batch * kv_heads, keys, query.device)
    block_rows, block_keys = _tile_sizes(query.dtype, count * group, head_dim)
    share = triton.cdiv(triton.cdiv(keys, splits), block_keys) * block_keys
    part_max, part_sum = query.new_empty(2, batch * kv_heads, splits, count * group, dtype=torch.float32)
    scores = query.new_empty(batch, kv_heads, keys, dtype=torch.float32)
    strides = (*query.stride()[:3], *key.stride()[:3], *mask_strides)
    sizes = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "WINDOW": count,
        "MASK": kind,
        "BLOCK_M": block_rows,
        "BLOCK_K": block_keys,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }
    normalise_kernel[(batch * kv_heads, triton.cdiv(count * group, block_rows), splits)](
        query, key, mask, rows, part_max, part_sum, scale, keys, share, kv_heads, *strides, **sizes
    )
    score_kernel[(batch * kv_heads, triton.cdiv(keys, block_keys))](
        query,
        key,
        mask,
        rows,
        share_of_row,
        part_max,
        part_sum,
        scores,
        scale,
        keys,
        splits,
        kv_heads,
        *strides,
        **sizes,
        BLOCK_P=triton.next_power_of_2(splits),
    )
    return scores


def _tile_sizes(dtype: torch.dtype, rows: int, head_dim: int) -> tuple[int, int]:
    """Rows and keys of a tile: fewer where they are wide, for the shared memory of an sm_86 or a gfx942."""
    width = triton.next_power_of_2(head_dim) * dtype.itemsize
    most, keys = (MAX_BLOCK_ROWS, BLOCK_KEYS) if width <= WIDE else (16, max(16, BLOCK_KEYS * WIDE // (2 * width)))
    return min(most, max(16, triton.next_power_of_2(rows))), keys
