"""CPU implementation of `avl::partition_`: the C++ kernel, or ATen where it cannot be built."""

from collections.abc import Sequence

from torch import Tensor

from avl_fx.kernels.partition.native import partition_native


def partition_cpu(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> None:
    """`avl::partition_` on CPU; see the schema for shapes. Here ``slots`` has three dimensions."""
    partition_layers_cpu([(key, value, 0)], source[None], slots[None])


def partition_layers_cpu(
    layers: Sequence[tuple[Tensor | None, Tensor | None, int]], source: Tensor, slots: Tensor
) -> None:
    """`partition_layers_` on CPU, of layers that are laid out alike; see there for shapes."""
    orders = [order for _, _, order in layers]
    for caches in zip(*(layer[:2] for layer in layers), strict=True):
        there = [cache for cache in caches if cache is not None]
        if not there or partition_native(there, orders, source, slots):
            continue
        for cache, order in zip(there, orders, strict=True):
            partition_aten(cache, None, source[order], slots[order])


def partition_aten(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> None:
    """The rows that change are gathered, then scattered; no other is touched."""
    for cache in (key, value):
        if cache is None:
            continue
        kv_heads = cache.shape[1]
        origins, targets = source.expand(-1, kv_heads, -1), slots.expand(-1, kv_heads, -1)
        row, head, move = ((targets >= 0) & (targets != origins)).nonzero(as_tuple=True)
        cache[row, head, targets[row, head, move]] = cache[row, head, origins[row, head, move]]
