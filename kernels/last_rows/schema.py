"""`avl::last_rows`: what the last real query of each batch row attends to, head by head.

Calibration compares layers by these rows (Q Cache, arXiv 2602.01901). `avl::visual_scores` averages over the heads of a
group; how alike two layers are has to be asked of each head.
"""

import torch
from torch import Tensor

from avl_fx.kernels.dispatch import implementation

__all__ = ["last_rows"]


@torch.library.custom_op("avl::last_rows", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def last_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    counted: Tensor | None,
    positions: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Softmax probabilities of each key under the last real query of each batch row.

    Which query that is, ``counted`` says, so that layers with masks of their own (a sliding window hides the prompt
    from padding behind it) agree on it. Per batch row: the *visible* keys are those that the last query sees there
    (through any head); the *real* queries are those that stand at a visible key, and not behind the last of them. So
    padding counts neither on the left nor on the right.

    Args:
        query: ``[batch, heads, queries, head_dim]``; float32, bfloat16, float16 or float64.
        key: ``[batch, kv_heads, keys, head_dim]`` with ``heads % kv_heads == 0``.
        mask: the layer's own, broadcastable to ``[batch, heads, queries, keys]``; boolean (True = visible) or additive
            in any floating dtype; ``None`` means every key is visible.
        counted: a mask of the same kind, over the same queries and any number of keys. An additive entry below half of
            its dtype's lowest value hides. ``None``: the last query is real.
        positions: int64 ``[queries]``, the position of each query among the keys of ``counted``; ``None`` means the
            last ones.
        scale: factor on the logits, in query.key units.
        is_causal: upper-left aligned causal mask, as in ``scaled_dot_product_attention``; excludes ``mask``.

    Returns:
        float32 ``[batch, heads, keys]``; each head's row adds up to 1. Zeros for a batch row without a real query, and
        for a head that sees no key.

    Raises:
        ValueError: shapes or dtypes that do not fit; a mask beside ``is_causal``.
        NotImplementedError: a device without an implementation.
    """
    from avl_fx.kernels.last_rows import IMPLEMENTATIONS

    _check(query, key, mask, counted, positions, is_causal)
    return implementation("last_rows", IMPLEMENTATIONS, query.device)(
        query, key, mask, counted, positions, scale, is_causal
    )


@last_rows.register_fake
def _(query, key, mask, counted, positions, scale, is_causal):
    return query.new_empty((query.shape[0], query.shape[1], key.shape[2]), dtype=torch.float32)


def _check(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    counted: Tensor | None,
    positions: Tensor | None,
    is_causal: bool,
) -> None:
    batch, heads, queries, head_dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or heads % key.shape[1] != 0 or key.shape[3] != head_dim:
        raise ValueError(f"key: {tuple(key.shape)} does not fit the query {tuple(query.shape)}.")
    if key.dtype != query.dtype:
        raise ValueError(f"key: {key.dtype} beside a query of {query.dtype}.")
    if mask is not None and is_causal:
        raise ValueError("mask: given beside is_causal. Fix: give one of them.")
    for name, given in (("mask", mask), ("counted", counted)):
        if given is None:
            continue
        keys = key.shape[2] if name == "mask" else given.shape[-1]
        wanted = (batch, heads, queries, keys)
        sizes = (1,) * (4 - given.dim()) + tuple(given.shape)
        if len(sizes) > 4 or any(size not in (1, w) for size, w in zip(sizes, wanted, strict=True)):
            raise ValueError(f"{name}: {tuple(given.shape)} does not broadcast to {wanted}.")
    if positions is not None and (positions.shape != (queries,) or positions.dtype != torch.int64):
        raise ValueError(f"positions: {tuple(positions.shape)}, {positions.dtype} instead of int64 [{queries}].")
