"""`avl::append_rows`: the update of a compact cache, in a graph that believes in a complete one.

A compact cache holds fewer rows than the model has fed. Masks, positions and shapes in the model's graph are those of
the complete cache, so that nothing but attention itself has to know; this operator stands between the two. Like
`avl::attention` it is an *intermediate representation*: `resolve_rows` replaces it by the rows that are really there.
"""

import torch
from torch import Tensor

__all__ = ["append_rows"]


@torch.library.custom_op("avl::append_rows", mutates_args=())
def append_rows(stored: Tensor, new: Tensor, length: int, plan: str) -> Tensor:
    """The cache after ``new`` was appended, with a row for each token that was ever fed.

    Args:
        stored: ``[batch, kv_heads, rows, dim]``, the rows that the cache holds; ``rows <= length``.
        new: ``[batch, kv_heads, queries, dim]``.
        length: tokens fed so far, without ``new``.
        plan: fingerprint of the plan that the cache was made for.

    Returns:
        ``[batch, kv_heads, length + queries, dim]``.

    Raises:
        RuntimeError: rows are missing, so there is no such tensor: the operator was not rewritten.
    """
    from avl_fx.kernels.append_rows.reference import append_rows_reference

    return append_rows_reference(stored, new, length, plan)


@append_rows.register_fake
def _(stored, new, length, plan):
    batch, heads, queries, dim = new.shape
    return new.new_empty((batch, heads, length + queries, dim))
