"""Triton implementation of `avl::partition_` for CUDA and ROCm: rows that change go through scratch memory.

Two launches, because a row may be wanted elsewhere before it is overwritten: `gather_kernel` copies the rows out,
`scatter_kernel` puts them where they belong. Rows that stay are neither read nor written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 16


@triton.jit
def _moves(source, slots, i, source_head, source_move, slots_head, slots_move, moves):
    """Where the rows ``i`` come from, where they go, and whether they move at all."""
    origin = tl.load(source + source_head + i * source_move, mask=i < moves, other=0)
    target = tl.load(slots + slots_head + i * slots_move, mask=i < moves, other=-1)
    return origin, target, (target >= 0) & (target != origin)


@triton.jit
def gather_kernel(
    key,
    value,
    key_scratch,
    value_scratch,
    source,
    slots,
    moves,
    kv_heads,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    source_batch,
    source_head,
    source_move,
    slots_batch,
    slots_head,
    slots_move,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Copies rows of one key/value head out of the cache; a dimension of 0 means that there is no such cache."""
    program = tl.program_id(0).to(tl.int64)
    b, h = program // kv_heads, program % kv_heads
    i = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at_source, at_slots = b * source_batch + h * source_head, b * slots_batch + h * slots_head
    origin, _, moving = _moves(source, slots, i, at_source, source_move, at_slots, slots_move, moves)
    scratch = program * moves + i
    if KEY_DIM > 0:
        d = tl.arange(0, BLOCK_D)
        inside = moving[:, None] & (d < KEY_DIM)[None, :]
        rows = tl.load(key + b * key_batch + h * key_head + origin[:, None] * key_row + d[None, :], mask=inside)
        tl.store(key_scratch + scratch[:, None] * KEY_DIM + d[None, :], rows, mask=inside)
    if VALUE_DIM > 0:
        v = tl.arange(0, BLOCK_V)
        inside = moving[:, None] & (v < VALUE_DIM)[None, :]
        rows = tl.load(value + b * value_batch + h * value_head + origin[:, None] * value_row + v[None, :], mask=inside)
        tl.store(value_scratch + scratch[:, None] * VALUE_DIM + v[None, :], rows, mask=inside)


@triton.jit
def scatter_kernel(
    key,
    value,
    key_scratch,
    value_scratch,
    source,
    slots,
    moves,
    kv_heads,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    source_batch,
    source_head,
    source_move,
    slots_batch,
    slots_head,
    slots_move,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Copies the rows that `gather_kernel` left in the scratch memory into their slots."""
    program = tl.program_id(0).to(tl.int64)
    b, h = program // kv_heads, program % kv_heads
    i = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at_source, at_slots = b * source_batch + h * source_head, b * slots_batch + h * slots_head
    _, target, moving = _moves(source, slots, i, at_source, source_move, at_slots, slots_move, moves)
    scratch = program * moves + i
    if KEY_DIM > 0:
        d = tl.arange(0, BLOCK_D)
        inside = moving[:, None] & (d < KEY_DIM)[None, :]
        rows = tl.load(key_scratch + scratch[:, None] * KEY_DIM + d[None, :], mask=inside)
        tl.store(key + b * key_batch + h * key_head + target[:, None] * key_row + d[None, :], rows, mask=inside)
    if VALUE_DIM > 0:
        v = tl.arange(0, BLOCK_V)
        inside = moving[:, None] & (v < VALUE_DIM)[None, :]
        rows = tl.load(value_scratch + scratch[:, None] * VALUE_DIM + v[None, :], mask=inside)
        tl.store(value + b * value_batch + h * value_head + target[:, None] * value_row + v[None, :], rows, mask=inside)


def partition_triton(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> None:
    """`avl::partition_` on CUDA and ROCm; see the schema for shapes. Here ``slots`` has three dimensions."""
    caches = [cache for cache in (key, value) if cache is not None]
    batch, kv_heads = caches[0].shape[:2]
    moves = source.shape[2]
    source, slots = source.expand(-1, kv_heads, -1), slots.expand(-1, kv_heads, -1)
    dims = [0 if cache is None else cache.shape[3] for cache in (key, value)]
    strides = [(0, 0, 0) if cache is None else cache.stride()[:3] for cache in (key, value)]
    scratch = [None if cache is None else _scratch(cache, moves) for cache in (key, value)]
    for kernel in (gather_kernel, scatter_kernel):
        kernel[(batch * kv_heads, triton.cdiv(moves, BLOCK_ROWS))](
            key,
            value,
            *scratch,
            source,
            slots,
            moves,
            kv_heads,
            *strides[0],
            *strides[1],
            *source.stride(),
            *slots.stride(),
            KEY_DIM=dims[0],
            VALUE_DIM=dims[1],
            BLOCK_R=BLOCK_ROWS,
            BLOCK_D=triton.next_power_of_2(max(1, dims[0])),
            BLOCK_V=triton.next_power_of_2(max(1, dims[1])),
        )


def _scratch(cache: Tensor, moves: int) -> Tensor:
    batch, kv_heads, _, dim = cache.shape
    return torch.empty(batch, kv_heads, moves, dim, dtype=cache.dtype, device=cache.device)
