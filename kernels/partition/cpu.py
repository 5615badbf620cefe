"""CPU implementation of `avl::partition_`: the C++ kernel, or ATen where it cannot be built."""

from torch import Tensor

from avl_fx.kernels.partition.native import partition_native


def partition_cpu(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> None:
    """`avl::partition_` on CPU; see the schema for shapes. Here ``slots`` has three dimensions."""
    if not partition_native(key, value, source, slots):
        partition_aten(key, value, source, slots)


def partition_aten(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> None:
    """The rows that change are gathered, then scattered; no other is touched."""
    for cache in (key, value):
        if cache is None:
            continue
        kv_heads = cache.shape[1]
        origins, targets = source.expand(-1, kv_heads, -1), slots.expand(-1, kv_heads, -1)
        row, head, move = ((targets >= 0) & (targets != origins)).nonzero(as_tuple=True)
        cache[row, head, targets[row, head, move]] = cache[row, head, origins[row, head, move]]
