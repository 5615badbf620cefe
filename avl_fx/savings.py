"""What a plan saves, in FLOPs and bytes: formulas, and the size of a cache as it is.

A multiplication and an addition count as one FLOP each: a matmul of ``[m, k]`` with ``[k, n]`` has ``2 * m * k * n``.
Bytes are those of tensors. Nothing is said about time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from avl_fx.growing import has_room
from avl_fx.reads import visual_kept

__all__ = [
    "LayerShape",
    "attention_flops",
    "cache_bytes",
    "compact_cache_bytes",
    "dense_cache_bytes",
    "key_bytes",
    "kv_bytes",
    "projection_flops",
    "rope_flops",
    "scoring_flops",
    "spare_bytes",
]


class LayerShape(NamedTuple):
    """What one layer stores of a token: a key and a value in each KV head."""

    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    """Bytes of an element."""


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


def scoring_flops(batch: int, heads: int, window: int, keys: int, head_dim: int) -> int:
    """FLOPs of ranking one layer's visual keys: the logits of the prompt's last ``window`` queries, once more.

    ``2 * batch * heads * window * keys * head_dim``; a plan with a section ``vision`` or ``text`` adds it to a prompt.
    """
    return 2 * batch * heads * window * keys * head_dim


def key_bytes(batch: int, kv_heads: int, length: int, head_dim: int, itemsize: int) -> int:
    """Bytes of the keys of one layer: ``batch * kv_heads * length * head_dim * itemsize``.

    This is what a lazy layer does not store in a cache that grows. In a static cache its buffer stays allocated.
    """
    return batch * kv_heads * length * head_dim * itemsize


def kv_bytes(batch: int, kv_heads: int, length: int, head_dim: int, value_dim: int, itemsize: int) -> int:
    """Bytes of the keys and values of one layer, none of them dropped."""
    return key_bytes(batch, kv_heads, length, head_dim + value_dim, itemsize)


def compact_cache_bytes(
    text: Sequence[int],
    visual: Sequence[int],
    secondary: float,
    layers: Sequence[LayerShape],
    lazy_layers: Collection[int] = (),
    mode: str = "gla",
) -> int:
    """Bytes of a cache that stores nothing but what the plan may still read.

    All batch rows take as many cache rows as the one that needs most: ``max(text + int(secondary * visual))``. Each
    layer stores a key and a value a row and KV head. A lazy layer stores no key in mode ``gla``. In the modes ``vla``
    and ``vla_scores`` it has none for visual rows, for as many of them as every batch row has.

    A stock cache of the same tokens takes `kv_bytes` of the whole length in each layer, whatever the plan says.

    Args:
        text: text keys that are stored, a batch row: all before the first visual key, and of those behind it
            `avl_fx.reads.text_kept`. Padding that has to be stored counts as text.
        visual: visual keys of the prompt, a batch row.
        secondary: share of them that is kept; 1.0 under a plan without section ``vision``.
        layers: those that are partitioned. What others (sliding windows, cross-attention) store is `kv_bytes`.
        lazy_layers: indices into ``layers``.
        mode: of the lazy layers.

    Raises:
        ValueError: ``text`` and ``visual`` are for different batches.
    """
    rows = max((t + visual_kept(v, secondary) for t, v in zip(text, visual, strict=True)), default=0)
    fewest = min((visual_kept(v, secondary) for v in visual), default=0)
    lazy_keys = 0 if mode == "gla" else rows - max(0, min(fewest, rows - 1))
    return sum(
        key_bytes(len(text), s.kv_heads, lazy_keys if n in lazy_layers else rows, s.head_dim, s.itemsize)
        + key_bytes(len(text), s.kv_heads, rows, s.value_dim, s.itemsize)
        for n, s in enumerate(layers)
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of memory that a cache holds on to.

    Each underlying storage counts once and whole: views of one tensor are not counted twice, and the marker that stands
    for dropped keys counts as the single element that it occupies. Of a cache that grows in place the rows of its
    tokens count, not the room that is kept for later ones.

    Args:
        cache: a cache of transformers, a tensor, or any nesting of mappings, sequences and objects that hold tensors.
            Of objects with ``keys`` and ``values`` only these two count, not their counters.
    """
    return sum(held for held, _ in _storages(cache))


def spare_bytes(cache: Any) -> int:
    """Bytes of memory behind the tokens of a cache that grows in place: room for later tokens, not in `cache_bytes`.

    Args:
        cache: as in `cache_bytes`.
    """
    return sum(whole - held for held, whole in _storages(cache))


def _storages(cache: Any) -> Iterable[tuple[int, int]]:
    """``(bytes that count, all bytes)`` of every underlying storage."""
    found: dict[tuple[torch.device, int], tuple[int, int]] = {}
    for tensor in _tensors(cache):
        storage = tensor.untyped_storage()
        held = tensor.numel() * tensor.element_size() if has_room(tensor) else storage.nbytes()
        at = tensor.device, storage.data_ptr()
        found[at] = max(found.get(at, (0, 0))[0], held), storage.nbytes()
    return found.values()


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
