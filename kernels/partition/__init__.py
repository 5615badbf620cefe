"""Rows of a key cache in another order, in place: schema, reference, and one implementation a device."""

from collections.abc import Callable
from typing import Any

import torch

from avl_fx.kernels.partition.cpu import partition_cpu, partition_layers_cpu
from avl_fx.kernels.partition.layers import partition_layers_
from avl_fx.kernels.partition.reference import partition_reference
from avl_fx.kernels.partition.schema import partition_

__all__ = ["IMPLEMENTATIONS", "TOGETHER", "partition_", "partition_layers_", "partition_reference"]


def _cuda(*args: Any) -> None:
    from avl_fx.kernels.partition.triton import partition_triton

    with torch.cuda.device_of(args[2]):
        partition_triton(*args)


def _cuda_layers(*args: Any) -> None:
    from avl_fx.kernels.partition.triton import partition_layers_triton

    with torch.cuda.device_of(args[1]):
        partition_layers_triton(*args)


IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    "cpu": partition_cpu,
    "cuda": _cuda,
}
"""Device type -> implementation (ROCm devices are of type "cuda" as well). Triton is imported at the first call."""

TOGETHER: dict[str, Callable[..., None]] = {"cpu": partition_layers_cpu, "cuda": _cuda_layers}
"""Device type -> what moves the rows of layers that are laid out alike; elsewhere one layer moves after the other."""
