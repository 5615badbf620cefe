"""Canonical attention: schema (the IR node), reference, and one lowering a device."""

from collections.abc import Callable

from torch import Tensor

from avl_fx.kernels.attention.cpu import attention_cpu
from avl_fx.kernels.attention.cuda import attention_cuda
from avl_fx.kernels.attention.reference import attention_reference
from avl_fx.kernels.attention.schema import attention

__all__ = ["LOWERINGS", "attention", "attention_reference"]

LOWERINGS: dict[str, Callable[..., Tensor]] = {
    "cpu": attention_cpu,
    "cuda": attention_cuda,
}
"""Device type -> lowering. A device that is not listed keeps what the model wrote (`lower` refuses the site)."""
