"""A linear layer on a few rows: schema, reference, and one implementation a device."""

from collections.abc import Callable

from torch import Tensor

from avl_fx.kernels.narrow_linear.cpu import narrow_linear_cpu
from avl_fx.kernels.narrow_linear.native import is_available, pays
from avl_fx.kernels.narrow_linear.reference import narrow_linear_reference
from avl_fx.kernels.narrow_linear.schema import MAX_ROWS, narrow_linear

__all__ = ["IMPLEMENTATIONS", "MAX_ROWS", "is_available", "narrow_linear", "narrow_linear_reference", "pays"]

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"cpu": narrow_linear_cpu}
"""Device type -> implementation. A GPU's own matrix products read each weight once already."""
