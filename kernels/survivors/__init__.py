"""The tokens behind a prefill filter: schema, reference, and one implementation a device."""

from collections.abc import Callable

from torch import Tensor

from avl_fx.kernels.survivors.aten import survivors_aten
from avl_fx.kernels.survivors.reference import survivors_reference
from avl_fx.kernels.survivors.schema import survivors

__all__ = ["IMPLEMENTATIONS", "survivors", "survivors_reference"]

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": survivors_aten,
    "cuda": survivors_aten,
}
"""Device type -> implementation (ROCm devices are of type "cuda" as well)."""
