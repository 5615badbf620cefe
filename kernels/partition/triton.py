"""Triton implementation of `avl::partition_` for CUDA and ROCm: rows that change go through scratch memory.

Two launches, because a row may be wanted elsewhere before it is overwritten: `gather_kernel` copies the rows out,
`scatter_kernel` puts them where they belong. Rows that stay are neither read nor written. The caches of several layers
that are laid out alike take two launches as well: the kernels then find them by a table of addresses.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 16
MOST_SCRATCH = 2**28
"""Bytes for the keys or values of all layers that move at once; where they need more, layers take turns."""
ENTRIES = tl.constexpr(4)
"""Of the table, for each layer: addresses of its keys and of its values, which order it takes, and one that is not
used. So the table of later layers begins at a multiple of 16 bytes as well, and compiles to the same kernel."""


@triton.jit
def _cache(like, table, layer, ENTRY: tl.constexpr, ALIGNED: tl.constexpr):
    """The cache of a layer: by its address, with the type of ``like``; that itself where there is no table."""
    if table is None:
        cache = like
    elif ALIGNED:
        cache = tl.multiple_of(tl.load(table + layer * ENTRIES + ENTRY).to(like.dtype), 16)
    else:
        cache = tl.load(table + layer * ENTRIES + ENTRY).to(like.dtype)
    return cache


@triton.jit
def _order(table, layer):
    """Which of the orders the layer takes."""
    return layer if table is None else tl.load(table + layer * ENTRIES + 2)


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
    table,
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
    source_order,
    source_batch,
    source_head,
    source_move,
    slots_order,
    slots_batch,
    slots_head,
    slots_move,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Copies rows of one key/value head out of a layer's caches; a dimension of 0 means that there is no such cache."""
    program = tl.program_id(0).to(tl.int64)
    b, h, layer = program // kv_heads, program % kv_heads, tl.program_id(2).to(tl.int64)
    order = _order(table, layer)
    i = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at_source = order * source_order + b * source_batch + h * source_head
    at_slots = order * slots_order + b * slots_batch + h * slots_head
    origin, _, moving = _moves(source, slots, i, at_source, source_move, at_slots, slots_move, moves)
    scratch = (layer * tl.num_programs(0) + program) * moves + i
    if KEY_DIM > 0:
        key = _cache(key, table, layer, 0, ALIGNED)
        d = tl.arange(0, BLOCK_D)
        inside = moving[:, None] & (d < KEY_DIM)[None, :]
        rows = tl.load(key + b * key_batch + h * key_head + origin[:, None] * key_row + d[None, :], mask=inside)
        tl.store(key_scratch + scratch[:, None] * KEY_DIM + d[None, :], rows, mask=inside)
    if VALUE_DIM > 0:
        value = _cache(value, table, layer, 1, ALIGNED)
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
    table,
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
    source_order,
    source_batch,
    source_head,
    source_move,
    slots_order,
    slots_batch,
    slots_head,
    slots_move,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Copies the rows that `gather_kernel` left in the scratch memory into their slots."""
    program = tl.program_id(0).to(tl.int64)
    b, h, layer = program // kv_heads, program % kv_heads, tl.program_id(2).to(tl.int64)
    order = _order(table, layer)
    i = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at_source = order * source_order + b * source_batch + h * source_head
    at_slots = order * slots_order + b * slots_batch + h * slots_head
    _, target, moving = _moves(source, slots, i, at_source, source_move, at_slots, slots_move, moves)
    scratch = (layer * tl.num_programs(0) + program) * moves + i
    if KEY_DIM > 0:
        key = _cache(key, table, layer, 0, ALIGNED)
        d = tl.arange(0, BLOCK_D)
        inside = moving[:, None] & (d < KEY_DIM)[None, :]
        rows = tl.load(key_scratch + scratch[:, None] * KEY_DIM + d[None, :], mask=inside)
        tl.store(key + b * key_batch + h * key_head + target[:, None] * key_row + d[None, :], rows, mask=inside)
    if VALUE_DIM > 0:
        value = _cache(value, table, layer, 1, ALIGNED)
        v = tl.arange(0, BLOCK_V)
        inside = moving[:, None] & (v < VALUE_DIM)[None, :]
        rows = tl.load(value_scratch + scratch[:, None] * VALUE_DIM + v[None, :], mask=inside)
        tl.store(value + b * value_batch + h * value_head + target[:, None] * value_row + v[None, :], rows, mask=inside)


def partition_triton(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> None:
    """`avl::partition_` on CUDA and ROCm; see the schema for shapes. Here ``slots`` has three dimensions."""
    _launch([(key, value)], None, source[None], slots[None])


def partition_layers_triton(
    caches: Sequence[tuple[Tensor | None, Tensor | None, int]], source: Tensor, slots: Tensor
) -> None:
    """`partition_layers_` on CUDA and ROCm, of layers that are laid out alike; see there for shapes."""
    pairs = [(key, value) for key, value, _ in caches]
    rows = [(*(0 if cache is None else cache.data_ptr() for cache in (key, value)), n, 0) for key, value, n in caches]
    # From pinned memory: the host need not wait until the device has it.
    table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=source.is_cuda)
    table = table.to(source.device, non_blocking=True)
    together = max(1, MOST_SCRATCH // max(_scratch_bytes(cache, source.shape[-1]) for cache in pairs[0]))
    for first in range(0, len(pairs), together):
        last = first + together
        _launch(pairs[first:last], table[first:last], source, slots)


def _launch(
    pairs: Sequence[tuple[Tensor | None, Tensor | None]], table: Tensor | None, source: Tensor, slots: Tensor
) -> None:
    """Moves rows of all ``pairs`` of keys and values. Without a ``table`` there is one of them."""
    key, value = pairs[0]
    batch, kv_heads = next(cache for cache in pairs[0] if cache is not None).shape[:2]
    moves = source.shape[-1]
    source, slots = source.expand(-1, -1, kv_heads, -1), slots.expand(-1, -1, kv_heads, -1)
    dims = [0 if cache is None else cache.shape[3] for cache in pairs[0]]
    strides = [(0, 0, 0) if cache is None else cache.stride()[:3] for cache in pairs[0]]
    scratch = [None if cache is None else _scratch(cache, len(pairs) * batch * kv_heads * moves) for cache in pairs[0]]
    aligned = all(cache.data_ptr() % 16 == 0 for pair in pairs for cache in pair if cache is not None)
    for kernel in (gather_kernel, scatter_kernel):
        kernel[(batch * kv_heads, triton.cdiv(moves, BLOCK_ROWS), len(pairs))](
            key,
            value,
            *scratch,
            table,
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
            ALIGNED=aligned,
            BLOCK_R=BLOCK_ROWS,
            BLOCK_D=triton.next_power_of_2(max(1, dims[0])),
            BLOCK_V=triton.next_power_of_2(max(1, dims[1])),
        )


def _scratch(cache: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, cache.shape[3], dtype=cache.dtype, device=cache.device)


def _scratch_bytes(cache: Tensor | None, moves: int) -> int:
    """What the rows of one layer take."""
    return 0 if cache is None else cache.shape[0] * cache.shape[1] * moves * cache.shape[3] * cache.element_size()
