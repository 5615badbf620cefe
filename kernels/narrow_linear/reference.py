"""The obvious implementation, in float64."""

from torch import Tensor


def narrow_linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Reference of `avl::narrow_linear`; see the schema for shapes."""
    out = input.double() @ weight.double().t()
    return (out if bias is None else out + bias.double()).to(input.dtype)
