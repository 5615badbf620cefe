"""Decode attention to latents and rotated keys as they lie: schema, reference, and one implementation a device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avl_fx.kernels.latent_decode.cpu import latent_decode_cpu
from avl_fx.kernels.latent_decode.reference import latent_decode_reference
from avl_fx.kernels.latent_decode.schema import latent_decode

__all__ = ["IMPLEMENTATIONS", "latent_decode", "latent_decode_reference"]


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from avl_fx.kernels.latent_decode.triton import latent_decode_triton

    with torch.cuda.device_of(args[0]):
        return latent_decode_triton(*args)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": latent_decode_cpu,
    "cuda": _cuda,
}
"""Device type -> implementation (ROCm devices are of type "cuda" as well). Triton is imported at the first call."""
