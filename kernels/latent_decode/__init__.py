"""Decode attention to latents and rotated keys as they lie: schema, reference, and one implementation a device."""

from collections.abc import Callable

from torch import Tensor

from avl_fx.kernels.latent_decode.aten import latent_decode_aten
from avl_fx.kernels.latent_decode.cpu import latent_decode_cpu
from avl_fx.kernels.latent_decode.reference import latent_decode_reference
from avl_fx.kernels.latent_decode.schema import latent_decode

__all__ = ["IMPLEMENTATIONS", "latent_decode", "latent_decode_reference"]

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": latent_decode_cpu,
    "cuda": latent_decode_aten,
}
"""Device type -> implementation (ROCm devices are of type "cuda" as well)."""
