"""What a plan saves, in FLOPs and bytes: formulas, and the size of a cache as it is.

A multiplication and an addition count as one FLOP each: a matmul of ``[m, k]`` with ``[k, n]`` has ``2 * m * k * n``.
Bytes are those of tensors. Nothing is said about time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avl_fx.growing import has_room

__all__ = [
    "attention_flops",
    "cache_bytes",
    "dense_cache_bytes",
    "key_bytes",
    "kv_bytes",
    "projection_flops",
    "rope_flops",
]


def projection_flops(rows: int, in_features: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """FLOPs of the query and key projections of one layer: ``2 * rows * in_features * (heads + kv_heads) * head_dim``.

    This is what a lazy layer (mode ``gla``) does not compute. Its values, its logits, its softmax and its output
    projection it computes as before.

    Args:
        rows: tokens that enter the layer, over the batch.
        in_features: width of the hidden states.
        heads, kv_heads, head_dim: of the layer.
    """
    return 2 * rows * in_features * (heads + kv_heads) * head_dim


def rope_flops(rows: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """FLOPs of the rotary embedding of one layer: ``3 * rows * (heads + kv_heads) * head_dim``.

    Two products and a sum for each element of query and key. A lazy layer inherits both already rotated.
    """
    return 3 * rows * (heads + kv_heads) * head_dim


def attention_flops(batch: int, heads: int, queries: int, keys: int, head_dim: int, value_dim: int) -> int:
    """FLOPs of the two matmuls of one attention: ``2 * batch * heads * queries * keys * (head_dim + value_dim)``.

    Masked positions count. Mode ``gla`` saves none of this: a lazy layer multiplies its anchor's query and key again.
    """
    return 2 * batch * heads * queries * keys * (head_dim + value_dim)


def key_bytes(batch: int, kv_heads: int, length: int, head_dim: int, itemsize: int) -> int:
    """Bytes of the keys of one layer: ``batch * kv_heads * length * head_dim * itemsize``.

    This is what a lazy layer does not store in a cache that grows. In a static cache its buffer stays allocated.
    """
    return batch * kv_heads * length * head_dim * itemsize


def kv_bytes(batch: int, kv_heads: int, length: int, head_dim: int, value_dim: int, itemsize: int) -> int:
    """Bytes of the keys and values of one layer, none of them dropped."""
    return key_bytes(batch, kv_heads, length, head_dim + value_dim, itemsize)


def cache_bytes(cache: Any) -> int:
    """Bytes of memory that a cache holds on to.

    Each underlying storage counts once and whole: views of one tensor are not counted twice, and the marker that stands
    for dropped keys counts as the single element that it occupies. Of a cache that grows in place the rows of its
    tokens count, not the room that is kept for later ones.

    Args:
        cache: a cache of transformers, a tensor, or any nesting of mappings, sequences and objects that hold tensors.
            Of objects with ``keys`` and ``values`` only these two count, not their counters.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in _tensors(cache):
        storage = tensor.untyped_storage()
        held = tensor.numel() * tensor.element_size() if has_room(tensor) else storage.nbytes()
        at = tensor.device, storage.data_ptr()
        storages[at] = max(storages.get(at, 0), held)
    return sum(storages.values())


def dense_cache_bytes(cache: Any) -> int:
    """Bytes that a cache would take if every layer stored what its shapes say: markers count in full.

    Args:
        cache: as in `cache_bytes`.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache))


def _tensors(cache: Any) -> Iterator[Tensor]:
    """All tensors of a cache, each object once."""
    seen: set[int] = set()
    pending = [cache]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        else:
            pending += _parts(item)


def _parts(item: Any) -> Iterable[Any]:
    if isinstance(item, str | bytes | int | float | torch.dtype | torch.device | type | nn.Module):
        return ()
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, list | tuple | set):
        return item
    keys, values = getattr(item, "keys", None), getattr(item, "values", None)
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        return keys, values
    return list(vars(item).values()) if hasattr(item, "__dict__") else ()
