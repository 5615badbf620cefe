"""Decode attention of lazy layers with their anchor's logits: schemas, references, and one implementation a device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avl_fx.kernels.inherited_decode.anchor import anchor_decode
from avl_fx.kernels.inherited_decode.cpu import anchor_decode_cpu, inherited_decode_cpu
from avl_fx.kernels.inherited_decode.reference import anchor_decode_reference, inherited_decode_reference
from avl_fx.kernels.inherited_decode.schema import inherited_decode

__all__ = [
    "ANCHOR_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "anchor_decode",
    "anchor_decode_reference",
    "inherited_decode",
    "inherited_decode_reference",
]


def _anchor_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from avl_fx.kernels.inherited_decode.triton import anchor_decode_triton

    with torch.cuda.device_of(args[0]):
        return anchor_decode_triton(*args)


def _cuda(*args: Any) -> Tensor:
    from avl_fx.kernels.inherited_decode.triton import inherited_decode_triton

    with torch.cuda.device_of(args[0]):
        return inherited_decode_triton(*args)


ANCHOR_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "cpu": anchor_decode_cpu,
    "cuda": _anchor_cuda,
}
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"cpu": inherited_decode_cpu, "cuda": _cuda}
"""Device type -> implementation (ROCm devices are of type "cuda" as well). Triton is imported at the first call."""
