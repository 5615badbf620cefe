"""Decode attention over ranges of the key cache: schema, reference, and one implementation a device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avl_fx.kernels.partitioned_decode.cpu import partitioned_decode_cpu
from avl_fx.kernels.partitioned_decode.reference import partitioned_decode_reference
from avl_fx.kernels.partitioned_decode.schema import partitioned_decode

__all__ = ["IMPLEMENTATIONS", "partitioned_decode", "partitioned_decode_reference"]


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from avl_fx.kernels.partitioned_decode.triton import partitioned_decode_triton

    with torch.cuda.device_of(args[0]):
        return partitioned_decode_triton(*args)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": partitioned_decode_cpu,
    "cuda": _cuda,
}
"""Device type -> implementation (ROCm devices are of type "cuda" as well). Triton is imported at the first call."""
