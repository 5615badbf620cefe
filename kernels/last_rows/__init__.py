"""Softmax rows of the last real query of a prompt: schema, reference, and one implementation a device."""

from collections.abc import Callable

from torch import Tensor

from avl_fx.kernels.last_rows.aten import last_rows_aten
from avl_fx.kernels.last_rows.reference import last_rows_reference
from avl_fx.kernels.last_rows.schema import last_rows

__all__ = ["IMPLEMENTATIONS", "last_rows", "last_rows_reference"]

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "cpu": last_rows_aten,
    "cuda": last_rows_aten,
}
"""Device type -> implementation (ROCm devices are of type "cuda" as well)."""
