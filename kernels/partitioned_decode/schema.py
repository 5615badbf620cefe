"""`avl::partitioned_decode`: one decode step's attention that reads only the given ranges of the key cache.

Partitioning reorders the visual rows of a cache so that those which matter stand first; what a step attends to is then
a few contiguous ranges (text, core, text), and everything between them is never read. The row of the new token is
stored on the way, so that no copy of the cache is made for it either.
"""

import torch
from torch import Tensor

from avl_fx.kernels.dispatch import implementation, keep_in_python
from avl_fx.kernels.partitioned_decode.capacity import check_spare_row

__all__ = ["MAX_SEGMENTS", "check", "check_ranges", "check_reading", "check_rows", "decode_error", "partitioned_decode"]

MAX_SEGMENTS = 256
"""Key ranges a batch row may have."""

NAME = "avl::partitioned_decode"


def partitioned_decode(
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
    """Attention of one query per batch row over ranges of its keys; keys outside of them are not read.

    Args:
        query: ``[batch, heads, 1, head_dim]``; float32, bfloat16 or float16 (the reference also takes float64).
        key: ``[batch, kv_heads, keys, head_dim]`` with ``heads % kv_heads == 0``; query head ``h`` reads key/value
            head ``h // (heads // kv_heads)`` (GQA). Any strides with a contiguous last dimension: usually a view of
            the occupied part of a larger buffer.
        value: ``[batch, kv_heads, keys, value_dim]``, strided in any way as well.
        new_key: ``[batch, kv_heads, 1, head_dim]`` or ``None``: the row of this step's token. It is stored behind the
            last row of ``key``, in the spare capacity of its buffer, and attended to: K' = ``keys + 1``. Without it
            K' = ``keys``.
        new_value: ``[batch, kv_heads, 1, value_dim]``; given exactly when ``new_key`` is.
        mask: broadcastable to ``[batch, heads, 1, K']``; boolean (True = visible) or additive in any floating dtype;
            hides keys beyond those that ``segments`` leaves out.
        segments: int64 ``[batch, S, 2]`` with S <= 256: the key ranges that a batch row reads, as (start >= 0,
            length). They do not overlap, stand in any order, and are clipped to K'; length 0 marks an unused entry.
            ``(0, large)`` alone is dense attention, and so is ``None``.
        weigh: int32 ``[1]`` on the device of the query: non-zero asks for the weights. ``None``: they are never wanted,
            and empty.
        scale: factor on the logits, in query.key units.

    Returns:
        Two tensors. The attention output, ``[batch, heads, 1, value_dim]`` in the query's dtype: zeros for a row that
        sees no key. The weights, float32 ``[batch, kv_heads, K']``: softmax probabilities averaged over the query heads
        that share a key/value head, 0 where nothing is read; their content is unspecified when ``weigh`` is 0. With
        ``weigh=None`` they are ``[batch, kv_heads, 0]``.

        NaN that is read shows in the result. Keys that are not read, or that the mask (False, or additive -inf) hides
        from all query heads of their group, may hold anything.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a new row without room behind the last one.
        NotImplementedError: a device without an implementation.

    The row that is stored lies outside of ``key`` and ``value`` as the caller sees them, so nothing visible is mutated
    and ``mutates_args`` is empty. The caller guarantees that no other live view shows it, and makes the longer view
    only after this call.
    """
    from avl_fx.kernels.partitioned_decode import IMPLEMENTATIONS

    check(query, key, value, new_key, new_value, segments, weigh)
    return implementation("partitioned_decode", IMPLEMENTATIONS, query.device)(
        query, key, value, new_key, new_value, mask, segments, weigh, scale
    )


# Not `custom_op`: what it wraps around each call takes as long as the attention of a short prompt itself.
torch.library.define(
    NAME,
    torch.library.infer_schema(partitioned_decode, mutates_args=()),
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
torch.library.impl(NAME, "CompositeExplicitAutograd")(partitioned_decode)


@torch.library.register_fake(NAME)
def _(query, key, value, new_key, new_value, mask, segments, weigh, scale):
    batch, kv_heads, keys, _ = key.shape
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    seen = keys if new_key is None else keys + 1
    return out, query.new_empty((batch, kv_heads, 0 if weigh is None else seen), dtype=torch.float32)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
) -> None:
    """Raise what `partitioned_decode` says of these arguments."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    if queries != 1:
        raise ValueError(f"query: {queries} rows instead of one. Fix: use avl::attention for more than one query.")
    if key.shape != (batch, kv_heads, keys, head_dim) or heads % kv_heads != 0:
        raise ValueError(f"key: {tuple(key.shape)} does not fit the query {tuple(query.shape)}.")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: {tuple(value.shape)} does not fit the keys {tuple(key.shape)}.")
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"key, value: {key.dtype} and {value.dtype} beside a query of {query.dtype}.")
    if (new_key is None) != (new_value is None):
        raise ValueError("new_key, new_value: only one of them is given. Fix: give both or neither.")
    check_rows("key", key, new_key)
    check_rows("value", value, new_value)
    check_reading(query, segments, weigh, key=key)


def check_reading(query: Tensor, segments: Tensor | None, weigh: Tensor | None, **caches: Tensor) -> None:
    """Raise unless ``segments`` and ``weigh`` are those of ``query``, and all of it is on one device."""
    check_ranges("segments", segments, query.shape[0])
    if weigh is not None and (weigh.shape != (1,) or weigh.dtype != torch.int32):
        raise ValueError(f"weigh: {tuple(weigh.shape)}, {weigh.dtype} instead of int32 [1].")
    for name, tensor in (*caches.items(), ("segments", segments), ("weigh", weigh)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name}: on {tensor.device}, and the query on {query.device}. Fix: move them together.")


def check_rows(name: str, cache: Tensor, new: Tensor | None) -> None:
    """Raise unless rows of ``cache`` are contiguous and ``new`` is one of them."""
    batch, kv_heads, _, dim = cache.shape
    if cache.stride(3) != 1:
        raise ValueError(f"{name}: its last dimension has stride {cache.stride(3)}. Fix: make it contiguous.")
    if new is not None and (new.shape != (batch, kv_heads, 1, dim) or new.dtype != cache.dtype):
        raise ValueError(f"new_{name}: {tuple(new.shape)}, {new.dtype} is no row of {tuple(cache.shape)}.")


def check_ranges(name: str, ranges: Tensor | None, batch: int) -> None:
    """Raise unless ``ranges`` are of the shape and dtype of `partitioned_decode`'s segments."""
    if ranges is None:
        return
    if ranges.dim() != 3 or ranges.shape[0] != batch or ranges.shape[2] != 2 or ranges.dtype != torch.int64:
        raise ValueError(f"{name}: {tuple(ranges.shape)}, {ranges.dtype} instead of int64 [{batch}, S, 2].")
    if ranges.shape[1] > MAX_SEGMENTS:
        raise ValueError(f"{name}: {ranges.shape[1]} a row. Fix: at most {MAX_SEGMENTS}; merge neighbours.")


def decode_error(query, key, value, new_key, new_value, mask, segments, weigh, scale) -> str:
    """What `partitioned_decode` would raise, in words; empty: nothing."""
    try:
        check(query, key, value, new_key, new_value, segments, weigh)
        if new_key is not None:
            check_spare_row(key)
            check_spare_row(value)
        if mask is not None:
            mask.expand(*query.shape[:2], 1, key.shape[2] + (new_key is not None))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


keep_in_python(NAME, partitioned_decode, decode_error)
