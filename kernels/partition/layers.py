"""`avl::partition_` for several layers at once: where their caches are laid out alike, all of them in two launches."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from avl_fx.kernels.partition.schema import check, partition_

__all__ = ["Layer", "partition_layers_"]

Layer = tuple[Tensor | None, Tensor | None, int]
"""Keys and values of one layer as `avl::partition_` takes them, and which of the orders is theirs."""


def partition_layers_(layers: Sequence[Layer], source: Tensor, slots: Tensor) -> None:
    """Move rows of all ``layers``, no two of which share memory.

    Args:
        layers: what moves.
        source: int64 ``[orders, batch, G, M]``: where each row comes from.
        slots: int64 ``[orders, batch, 1 or G, M]``: where it goes.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        NotImplementedError: a device without an implementation.
    """
    from avl_fx.kernels.partition import TOGETHER

    together = TOGETHER.get(source.device.type)
    alike: dict[Hashable, list[Layer]] = {}
    for number, (key, value, order) in enumerate(layers):
        layout = number if together is None else (_layout(key), _layout(value))
        alike.setdefault(layout, []).append((key, value, order))
    for group in alike.values():
        key, value, order = group[0]
        if together is None or len(group) == 1:
            partition_(key, value, source[order], slots[order])
        elif source.shape[-1] > 0:
            check(key, value, source[order], slots[order])
            together(group, source, slots)
            # As the operator does, which declares what it writes: a cache that somebody wrote has a newer version.
            torch.autograd.graph.increment_version([c for pair in group for c in pair[:2] if c is not None])


def _layout(cache: Tensor | None) -> Hashable:
    """Caches of equal layout differ in nothing but their address."""
    return None if cache is None else (cache.shape, cache.stride(), cache.dtype, cache.device)
