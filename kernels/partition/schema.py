"""`avl::partition_`: puts rows of a key cache into another order, in place.

Attention over keys that are all visible does not depend on their order, so the visual rows of a cache may change places
among themselves: core first, then secondary, then minor. The cache stays complete and what is read becomes contiguous.
"""

import torch
from torch import Tensor

from avl_fx.kernels.dispatch import implementation

__all__ = ["check", "partition_"]


@torch.library.custom_op("avl::partition_", mutates_args=("key", "value"), tags=(torch.Tag.needs_exact_strides,))
def partition_(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> None:
    """Move rows, all at once: ``new[b, h, slots[b, i]] = old[b, h, source[b, h, i]]`` for every ``i``.

    Args:
        key: ``[batch, kv_heads, keys, head_dim]`` or ``None``: any dtype, any strides with a contiguous last dimension.
        value: ``[batch, kv_heads, keys, value_dim]`` or ``None``.
        source: int64 ``[batch, G, M]`` with G 1 (all heads alike) or ``kv_heads``: where each row comes from.
        slots: int64 ``[batch, M]``, or ``[batch, 1 or kv_heads, M]``: where it goes. ``-1`` moves nothing (ragged
            rows); its source is not read. No slot occurs twice in a row.

    Rows that are not among the slots keep their content. With ``source`` a permutation of ``slots`` nothing is lost,
    and the inverse permutation restores every byte.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        IndexError: a row that the cache does not have (on CPU; nobody looks on a GPU).
        NotImplementedError: a device without an implementation.
    """
    from avl_fx.kernels.partition import IMPLEMENTATIONS

    check(key, value, source, slots)
    if source.shape[2] > 0 and not (key is None and value is None):
        slots = slots if slots.dim() == 3 else slots[:, None]
        implementation("partition_", IMPLEMENTATIONS, source.device)(key, value, source, slots)


@partition_.register_fake
def _(key, value, source, slots):
    return None


def check(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> None:
    """Raises what `partition_` raises of arguments that do not fit."""
    for name, index in (("source", source), ("slots", slots)):
        if index.dtype != torch.int64:
            raise ValueError(f"{name}: {index.dtype} instead of int64.")
    if source.dim() != 3 or slots.dim() not in (2, 3):
        raise ValueError(f"source, slots: shapes {tuple(source.shape)} and {tuple(slots.shape)} instead of [B, G, M].")
    batch, _, moves = source.shape
    if (slots.shape[0], slots.shape[-1]) != (batch, moves) or slots.device != source.device:
        raise ValueError(f"slots: {tuple(slots.shape)} on {slots.device} does not fit source {tuple(source.shape)}.")
    for name, cache in (("key", key), ("value", value)):
        if cache is None:
            continue
        if cache.dim() != 4 or cache.shape[0] != batch:
            raise ValueError(f"{name}: {tuple(cache.shape)} does not fit source {tuple(source.shape)}.")
        groups = {source.shape[1], *slots.shape[1:-1]}
        if not groups <= {1, cache.shape[1]}:
            raise ValueError(f"source, slots: {max(groups)} groups beside the {cache.shape[1]} heads of the {name}.")
        if cache.stride(3) != 1:
            raise ValueError(f"{name}: its last dimension has stride {cache.stride(3)}. Fix: make it contiguous.")
        if cache.device != source.device:
            raise ValueError(f"{name}: on {cache.device}, source on {source.device}. Fix: move one of them.")
