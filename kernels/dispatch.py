"""Which implementation of an operator runs: the one of its device, and no other."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["implementation"]


def implementation(name: str, table: Mapping[str, Callable[..., Any]], device: torch.device) -> Callable[..., Any]:
    """The implementation of ``name`` for ``device``.

    Raises:
        NotImplementedError: the table has none; another device's is never taken instead.
    """
    chosen = table.get(device.type)
    if chosen is None:
        raise NotImplementedError(
            f"avl::{name} has no implementation for device type {device.type!r}, only for {', '.join(sorted(table))}. "
            f"Fix: move the model to one of these, or compile it without partitioning."
        )
    return chosen
