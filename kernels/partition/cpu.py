"""CPU implementation of `avl::partition_`: the rows that change are gathered, then scattered; no other is touched."""

from torch import Tensor


def partition_cpu(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> None:
    """`avl::partition_` on CPU; see the schema for shapes. Here ``slots`` has three dimensions."""
    for cache in (key, value):
        if cache is None:
            continue
        kv_heads = cache.shape[1]
        origins, targets = source.expand(-1, kv_heads, -1), slots.expand(-1, kv_heads, -1)
        row, head, move = ((targets >= 0) & (targets != origins)).nonzero(as_tuple=True)
        cache[row, head, targets[row, head, move]] = cache[row, head, origins[row, head, move]]
