"""`avl::narrow_linear`: what `torch.nn.functional.linear` computes, made for a few rows.

A decode step multiplies each weight by one row a sequence. Then all that counts is to read the weight once, at the
speed of memory. On a CPU, the library calls behind a linear layer are made for many rows: 8 layers of a Llama-like
model with hidden size 768, 4 rows, 2 cores: 25 ms, and 12 ms here.
"""

import torch
from torch import Tensor

from avl_fx.kernels.dispatch import implementation

__all__ = ["MAX_ROWS", "narrow_linear"]

MAX_ROWS = 8
"""From about twice as many on, a matrix product made for many rows is as fast."""

NAME = "avl::narrow_linear"


def narrow_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input @ weight.T + bias``.

    Args:
        input: ``[..., features]``; with more than `MAX_ROWS` rows in all it is an ordinary matrix product.
        weight: ``[wide, features]`` in the dtype of ``input``.
        bias: ``[wide]`` or ``None``.

    Returns:
        ``[..., wide]``, contiguous; accumulated in float32.

    Raises:
        NotImplementedError: a device without an implementation.
        RuntimeError: shapes or dtypes that do not fit.
    """
    from avl_fx.kernels.narrow_linear import IMPLEMENTATIONS

    return implementation("narrow_linear", IMPLEMENTATIONS, input.device)(input, weight, bias)


# Not `custom_op`: what it wraps around each call takes as long as a small product.
torch.library.define(
    NAME, torch.library.infer_schema(narrow_linear, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.impl(NAME, "CompositeExplicitAutograd")(narrow_linear)


@torch.library.register_fake(NAME)
def _(input, weight, bias):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))
