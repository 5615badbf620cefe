"""Triton implementation of `avl::partitioned_decode` for CUDA and ROCm: split-KV flash decoding over key ranges.

`attend_kernel` has one program for each key/value head and split; the query heads of a group are the rows of its tile,
so each key is read once for all of them. The keys that a batch row reads are numbered through, and each split takes an
equal share of these numbers, however the ranges lie; tiles stay inside a range, so that their rows lie one behind the
other. `merge_kernel` joins the splits of each query head, where there is more than one. Where weights are asked for,
`attend_kernel` leaves its logits behind and `weigh_kernel` turns them into weights; no key is read twice.

Nothing here waits for the device: ranges and the wish for weights are read there. The number of splits follows from the
sizes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from avl_fx.kernels.partitioned_decode.capacity import with_spare_row
from avl_fx.kernels.splits import split_count

BLOCK_KEYS = 32
"""Keys of one tile. With 64, seven heads of 128 dimensions and a mask do not fit into the registers of sm_100."""
WIDE = 512
"""Bytes of a row of keys or values beyond which a tile holds half as many."""
WEIGHED_KEYS = 128
"""Keys of one tile of weights, for which nothing but logits is loaded."""
MOST_LOGITS = 8192
"""Of such a tile: the more heads share a key, the fewer keys it holds."""
MERGED_VALUES = 128
"""Values of a head that one program joins, of up to `MAX_SPLITS` splits."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-2e38)
"""Times LOG2_E it is still a float32; added to any logit it is all that is left."""


@triton.jit
def _range(segments, batch_row, keys, entries, number):
    """Start, and clipped length int32, of one range of a batch row."""
    at = segments + (batch_row * entries + number) * 2
    start = tl.load(at)
    return start, tl.maximum(tl.minimum(tl.load(at + 1), keys - start), 0).to(tl.int32)


@triton.jit
def _extent(segments, batch_row, keys, entries, BLOCK_S: tl.constexpr):
    """Entries up to the last range of a batch row that is not empty, and how many keys all of them hold, int32."""
    entry = tl.arange(0, BLOCK_S)
    at = segments + (batch_row * entries + entry) * 2
    start = tl.load(at, mask=entry < entries, other=0)
    length = tl.load(at + 1, mask=entry < entries, other=0)
    length = tl.maximum(tl.minimum(length, keys - start), 0)
    return tl.max(tl.where(length > 0, entry + 1, 0), axis=0), tl.sum(length, 0).to(tl.int32)


@triton.jit
def _share(segments, batch_row, keys, entries, split, splits, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """What `_extent` says, and which of the keys, numbered through, are those of a split: the first, one behind the
    last."""
    used, count = _extent(segments, batch_row, keys, entries, BLOCK_S)
    share = tl.cdiv(tl.cdiv(count, splits), BLOCK_K) * BLOCK_K
    first = split * share
    return used, count, first, tl.minimum(first + share, count)


@triton.jit
def _hides(mask, head, position, read, stride_head, stride_key, GROUP: tl.constexpr, MASK: tl.constexpr):
    """What the mask adds to the logits of ``[heads, keys]``, in units of log 2: 0, any bias, or -inf."""
    inside = (head < GROUP)[:, None] & read[None, :]
    at = mask + head[:, None].to(tl.int64) * stride_head + position[None, :] * stride_key
    if MASK == "bool":
        bias = tl.where(tl.load(at, mask=inside, other=0) != 0, 0.0, float("-inf"))
    else:
        bias = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        # The lowest finite mask stays finite: a row of nothing else is uniform.
        bias = tl.where(bias == float("-inf"), bias, tl.maximum(bias, LOWEST) * LOG2_E)
    return bias


@triton.jit
def _logits(query, key, scale, BLOCK_G: tl.constexpr):
    """``[heads, keys]`` in float32, in units of log 2; one head is a sum, more are a matrix product."""
    if BLOCK_G == 1:
        logits = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)[None, :]
    else:
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
    return logits * (scale * LOG2_E)


@triton.jit
def _update(logits, most, total):
    """One step of the running softmax: probabilities, factor on what was summed so far, new maximum and sum."""
    new = tl.maximum(most, tl.max(logits, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new)
    probabilities = tl.exp2(logits - base[:, None])
    factor = tl.exp2(most - base)
    return probabilities, factor, new, total * factor + tl.sum(probabilities, axis=1)


@triton.jit(do_not_specialize=["keys"])
def attend_kernel(
    query,
    key,
    value,
    new_key,
    new_value,
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
    kv_heads,
    entries,
    query_batch,
    query_head,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    new_key_batch,
    new_key_head,
    new_value_batch,
    new_value_head,
    mask_batch,
    mask_head,
    mask_key,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    APPEND: tl.constexpr,
    KEEP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Attention of one group of heads over one split of what its batch row reads; stores the new row if there is one.

    ``keys`` counts the rows that are stored already: the new one is taken from where it comes from. The logits of what
    is read go to ``kept``, [batch, heads, keys and the new one], in natural units: with ``KEEP`` "always", or "wanted"
    where ``keep_if`` says so. ``WHOLE``: there is one split, and ``out`` is the result instead of a part of it.
    """
    program = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch_row, kv_head = program // kv_heads, program % kv_heads
    g, n, d, v = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    head = kv_head * GROUP + g
    in_query = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(query + batch_row * query_batch + head[:, None] * query_head + d[None, :], mask=in_query, other=0.0)
    key += batch_row * key_batch + kv_head * key_head
    value += batch_row * value_batch + kv_head * value_head
    if MASK != "none":
        mask += batch_row * mask_batch + kv_head * GROUP * mask_head
    if KEEP != "never":
        row_of = (program * GROUP + g)[:, None] * (keys.to(tl.int64) + APPEND)
        keeps = (g < GROUP)[:, None]
        if KEEP == "wanted":
            keeps = keeps & (tl.load(keep_if) != 0)

    used, count, first, end = _share(segments, batch_row, keys, entries, split, splits, BLOCK_K, BLOCK_S)

    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    before = first * 0
    for number in range(used):
        begin, here = _range(segments, batch_row, keys, entries, number)
        low, high = tl.maximum(first - before, 0), tl.minimum(end - before, here)
        for at in range(low, high, BLOCK_K):
            inside = at + n < high
            read = inside
            row = begin + at
            if MASK != "none":
                bias = _hides(mask, g, row + n, inside, mask_head, mask_key, GROUP, MASK)
                read = read & (tl.max(bias, axis=0) != float("-inf"))
            in_key = read[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(key + row * key_row + n[:, None] * key_row + d[None, :], mask=in_key, other=0.0)
            logits = _logits(q, k, scale, BLOCK_G)
            if MASK != "none":
                logits = tl.where(bias == float("-inf"), float("-inf"), logits + bias)
            logits = tl.where(read[None, :], logits, float("-inf"))
            if KEEP != "never":
                tl.store(kept + row_of + (row + n)[None, :], logits * LN_2, mask=keeps & inside[None, :])
            p, factor, most, total = _update(logits, most, total)
            in_value = read[:, None] & (v < VALUE_DIM)[None, :]
            x = tl.load(value + row * value_row + n[:, None] * value_row + v[None, :], mask=in_value, other=0.0)
            if BLOCK_G == 1:
                product = tl.sum(tl.trans(p) * x.to(tl.float32), axis=0)[None, :]
            else:
                product = tl.dot(p.to(x.dtype), x, input_precision="ieee")
            sums = sums * factor[:, None] + product
        before += here

    if APPEND and split == 0:
        row = keys.to(tl.int64)
        in_key, in_value = d < HEAD_DIM, v < VALUE_DIM
        k = tl.load(new_key + batch_row * new_key_batch + kv_head * new_key_head + d, mask=in_key, other=0.0)
        x = tl.load(new_value + batch_row * new_value_batch + kv_head * new_value_head + v, mask=in_value, other=0.0)
        tl.store(key + row * key_row + d, k, mask=in_key)
        tl.store(value + row * value_row + v, x, mask=in_value)
        _, longer = _extent(segments, batch_row, row + 1, entries, BLOCK_S)
        seen = (g < GROUP) & (longer > count)
        logit = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * (scale * LOG2_E)
        if MASK != "none":
            here, there = tl.full([1], 1, tl.int1), row + tl.zeros([1], tl.int64)
            extra = tl.max(_hides(mask, g, there, here, mask_head, mask_key, GROUP, MASK), axis=1)
            seen = seen & (extra != float("-inf"))
            logit = logit + extra
        logit = tl.where(seen, logit, float("-inf"))
        if KEEP != "never":
            tl.store(kept + row_of + row, (logit * LN_2)[:, None], mask=keeps)
        p, factor, most, total = _update(logit[:, None], most, total)
        sums = sums * factor[:, None] + tl.where(seen[:, None], p * x.to(tl.float32)[None, :], 0.0)

    in_out = (g < GROUP)[:, None] & (v < VALUE_DIM)[None, :]
    if WHOLE:
        result, norm = _finished(sums, most, total)
        at_head = program * GROUP + g
        tl.store(out + at_head[:, None] * VALUE_DIM + v[None, :], result.to(out.dtype.element_ty), mask=in_out)
        tl.store(lse + at_head, norm, mask=g < GROUP)
    else:
        part = (program * splits + split) * GROUP + g
        tl.store(part_max + part, most, mask=g < GROUP)
        tl.store(part_sum + part, total, mask=g < GROUP)
        tl.store(out + part[:, None] * VALUE_DIM + v[None, :], sums, mask=in_out)


@triton.jit
def _finished(sums, most, total):
    """Results ``[heads, values]`` and the logarithm of each sum, in units of log 2, of a softmax that has seen all."""
    divisor = tl.where(total == 0.0, 1.0, total)
    base = tl.where(most == float("-inf"), 0.0, most)
    # A row that sees nothing has weights 0 = exp2(-inf).
    return sums / divisor[:, None], tl.where(total == 0.0, float("inf"), base + tl.log2(divisor))


@triton.jit
def merge_kernel(
    part_out,
    part_max,
    part_sum,
    out,
    lse,
    splits,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Joins the splits of one query head for a share of the values, and keeps the logarithm of its sum."""
    head = tl.program_id(0).to(tl.int64)
    p, v = tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    part = ((head // GROUP) * splits + p) * GROUP + head % GROUP
    most = tl.load(part_max + part, mask=p < splits, other=float("-inf"))
    sums = tl.load(part_sum + part, mask=p < splits, other=0.0)
    in_part = (p < splits)[:, None] & (v < VALUE_DIM)[None, :]
    parts = tl.load(part_out + part[:, None] * VALUE_DIM + v[None, :], mask=in_part, other=0.0)
    base = tl.max(most, axis=0)
    base = tl.where(base == float("-inf"), 0.0, base)
    factor = tl.exp2(most - base)
    total = tl.sum(factor * sums, axis=0)
    divisor = tl.where(total == 0.0, 1.0, total)
    result = tl.sum(factor[:, None] * parts, axis=0) / divisor
    tl.store(out + head * VALUE_DIM + v, result.to(out.dtype.element_ty), mask=v < VALUE_DIM)
    if tl.program_id(1) == 0:
        # A row that sees nothing has weights 0 = exp2(-inf).
        tl.store(lse + head, tl.where(total == 0.0, float("inf"), base + tl.log2(divisor)))


@triton.jit(do_not_specialize=["keys"])
def weigh_kernel(
    kept,
    segments,
    weigh,
    lse,
    weights,
    keys,
    kv_heads,
    entries,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Probabilities of a share of the keys, averaged over the heads of a group; ``keys`` counts the new row as well."""
    if tl.load(weigh) != 0:
        program = tl.program_id(0).to(tl.int64)
        split, splits = tl.program_id(1), tl.num_programs(1)
        batch_row = program // kv_heads
        g, n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
        used, _ = _extent(segments, batch_row, keys, entries, BLOCK_S)
        norm = tl.load(lse + program * GROUP + g, mask=g < GROUP, other=float("inf"))
        share = tl.cdiv(tl.cdiv(keys, splits), BLOCK_K) * BLOCK_K
        first = split * share
        for at in range(first, tl.minimum(first + share, keys), BLOCK_K):
            position = at + n
            read = position < 0
            for number in range(used):
                begin, here = _range(segments, batch_row, keys, entries, number)
                read = read | ((position >= begin) & (position < begin + here))
            inside = (g < GROUP)[:, None] & read[None, :]
            theirs = kept + (program * GROUP + g)[:, None] * keys + position[None, :]
            logits = tl.load(theirs, mask=inside, other=float("-inf")) * LOG2_E
            p = tl.exp2(logits - norm[:, None])
            tl.store(weights + program * keys + position, tl.sum(p, axis=0) / GROUP, mask=position < keys)


def partitioned_decode_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
    scale: float,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`avl::partitioned_decode` on CUDA and ROCm; see the schema for shapes.

    Args:
        kept: receives the logits of what is read; float32 ``[batch, heads, K']``, contiguous, -inf so far.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, keys, value_dim = *key.shape[1:3], value.shape[3]
    append = False
    new_strides: tuple[int, ...] = (0, 0, 0, 0)
    if new_key is not None and new_value is not None:
        append = True
        key, value = with_spare_row(key), with_spare_row(value)
        new_key, new_value = (new if new.stride(3) == 1 else new.contiguous() for new in (new_key, new_value))
        new_strides = (*new_key.stride()[:2], *new_value.stride()[:2])
    seen = key.shape[2]
    group = heads // kv_heads
    segments = ranges(segments, query, seen)
    query = query if query.stride(3) == 1 else query.contiguous()
    kind, mask, mask_strides = _mask(mask, (batch, heads, 1, seen))
    splits = split_count(batch * kv_heads, seen, query.device)

    out = query.new_empty(batch, heads, 1, value_dim)
    weights = query.new_empty(batch, kv_heads, 0 if weigh is None else seen, dtype=torch.float32)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    parts, part_max, part_sum = out, None, None
    if splits > 1:
        parts = query.new_empty(batch * kv_heads, splits, group, value_dim, dtype=torch.float32)
        part_max, part_sum = query.new_empty(2, batch * kv_heads, splits, group, dtype=torch.float32)
    keep = "always"
    if kept is None:
        keep = "never" if weigh is None else "wanted"
        kept = None if weigh is None else query.new_empty(batch, heads, seen, dtype=torch.float32)
    attend_kernel[(batch * kv_heads, splits)](
        query,
        key,
        value,
        new_key,
        new_value,
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
        kv_heads,
        segments.shape[1],
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        *new_strides,
        *mask_strides,
        GROUP=group,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        MASK=kind,
        APPEND=append,
        KEEP=keep,
        WHOLE=splits == 1,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_S=triton.next_power_of_2(max(1, segments.shape[1])),
        **tile(query.dtype, group, kind, max(head_dim, value_dim)),
    )
    if part_max is not None and part_sum is not None:
        merge(parts, part_max, part_sum, out, lse)
    if kept is not None and weigh is not None:
        weigh_keys(kept, segments, weigh, lse, weights)
    return out, weights


def merge(parts: Tensor, part_max: Tensor, part_sum: Tensor, out: Tensor, lse: Tensor) -> None:
    """Join what splits of the keys came to.

    Args:
        parts: sums of weighted values, float32 ``[programs, splits, heads of a program, value_dim]``.
        part_max, part_sum: of the running softmax, float32 ``[programs, splits, heads of a program]``.
        out: receives the result, ``[batch, heads, 1, value_dim]``.
        lse: receives the logarithm to base 2 of each head's sum, float32 ``[batch, heads]``.
    """
    _, splits, group, value_dim = parts.shape
    block_v = min(MERGED_VALUES, max(16, triton.next_power_of_2(value_dim)))
    merge_kernel[(lse.numel(), triton.cdiv(value_dim, block_v))](
        parts,
        part_max,
        part_sum,
        out,
        lse,
        splits,
        GROUP=group,
        VALUE_DIM=value_dim,
        BLOCK_V=block_v,
        BLOCK_P=triton.next_power_of_2(splits),
    )


def weigh_keys(kept: Tensor, segments: Tensor, weigh: Tensor, lse: Tensor, weights: Tensor) -> None:
    """Turn logits ``kept``, [batch, heads, keys], into ``weights``, [batch, kv_heads, keys], where ``weigh`` asks."""
    batch, heads, seen = kept.shape
    kv_heads = weights.shape[1]
    block_g = triton.next_power_of_2(heads // kv_heads)
    weigh_kernel[(batch * kv_heads, split_count(batch * kv_heads, seen, kept.device))](
        kept,
        segments,
        weigh,
        lse,
        weights,
        seen,
        kv_heads,
        segments.shape[1],
        GROUP=heads // kv_heads,
        BLOCK_G=block_g,
        BLOCK_K=max(16, min(WEIGHED_KEYS, MOST_LOGITS // block_g)),
        BLOCK_S=triton.next_power_of_2(max(1, segments.shape[1])),
    )


def ranges(segments: Tensor | None, like: Tensor, keys: int) -> Tensor:
    """The ranges that the kernels read, contiguous: ``segments``, or all ``keys`` for each batch row of ``like``."""
    if segments is None:
        segments = like.new_zeros(like.shape[0], 1, 2, dtype=torch.int64)
        segments[..., 1] = keys
    return segments.contiguous()


def tile(dtype: torch.dtype, group: int, mask: str, dim: int) -> dict[str, int]:
    """Sizes of a tile and of the program that computes it.

    Args:
        dtype: of query, key and value.
        group: query heads of a key/value head.
        mask: its kind.
        dim: elements of a key or a value, whichever has more.
    """
    # One head in half precision is padded: a product on matrix units lets the loads run ahead, a sum does not.
    rows = 1 if group == 1 and dtype == torch.float32 else max(16, triton.next_power_of_2(group))
    sizes = {"BLOCK_G": rows, "BLOCK_K": BLOCK_KEYS}
    width = triton.next_power_of_2(dim) * dtype.itemsize
    if width > WIDE:
        return sizes | _of_wide_rows(width, dtype)
    if width > WIDE // 2 or dtype == torch.float32 or mask != "none":
        return sizes
    # Of 33 such choices the least loss over eight shapes on an H200; the best for one shape is up to a fifth faster.
    return sizes | {"num_warps": 2, "num_stages": 3}


def _of_wide_rows(width: int, dtype: torch.dtype) -> dict[str, int]:
    """What fits into the shared memory of an sm_86 or a gfx942, in half precision into registers too (Gemma 4)."""
    if torch.version.hip is not None:  # with more warps its programs have fewer registers
        return {"BLOCK_K": 16, "num_warps": 4} | ({"num_stages": 1} if width > 2 * WIDE else {})
    return {"BLOCK_K": 16, "num_warps": 8} | ({"num_stages": 2} if dtype == torch.float32 else {})


def _mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[str, Tensor | None, tuple[int, int, int]]:
    """Its kind, the mask as the kernels load it, and its strides over batch, heads and keys."""
    if mask is None:
        return "none", None, (0, 0, 0)
    full = mask.expand(shape)
    strides = (full.stride(0), full.stride(1), full.stride(3))
    return ("bool", full.view(torch.uint8), strides) if mask.dtype == torch.bool else ("additive", full, strides)
