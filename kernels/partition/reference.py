"""The obvious implementation: one row after the other, out of a copy."""

from torch import Tensor


def partition_reference(key: Tensor | None, value: Tensor | None, source: Tensor, slots: Tensor) -> None:
    """Reference of `avl::partition_`; see the schema for shapes. Here ``slots`` has three dimensions."""
    for cache in (key, value):
        if cache is None:
            continue
        batch, kv_heads = cache.shape[:2]
        old = cache.clone()
        origins = source.expand(-1, kv_heads, -1).tolist()
        targets = slots.expand(-1, kv_heads, -1).tolist()
        for row in range(batch):
            for head in range(kv_heads):
                for origin, target in zip(origins[row][head], targets[row][head], strict=True):
                    if target >= 0:
                        cache[row, head, target] = old[row, head, origin]
