"""`avl::visual_scores`: how much the end of a prompt attends to each key.

The scores decide which visual keys are core, secondary and minor. They are softmax rows of a few queries, so a fused
attention kernel does not give them, and the whole attention matrix is never made for them.
"""

import torch
from torch import Tensor

from avl_fx.kernels.dispatch import implementation

__all__ = ["visual_scores"]


@torch.library.custom_op("avl::visual_scores", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def visual_scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
) -> Tensor:
    """Softmax probabilities of each key, averaged over the last real queries of a prompt and over a group's heads.

    Per batch row: the *visible* keys are those that the last query sees (through any head); the *real* queries are
    those that stand at a visible key, and not behind the last of them. So padding counts neither on the left nor on the
    right. The last ``window`` real queries score, fewer where there are fewer; without any the scores are 0.

    Args:
        query: ``[batch, heads, queries, head_dim]``; float32, bfloat16 or float16 (the reference also takes float64).
        key: ``[batch, kv_heads, keys, head_dim]`` with ``heads % kv_heads == 0``, any strides with a contiguous last
            dimension.
        mask: ``[batch or 1, heads or 1, queries, keys]``; boolean (True = visible) or additive in any floating dtype;
            ``None`` means every key is visible. An additive entry below half of its dtype's lowest value hides.
        positions: int64 ``[queries]``, the key position of each query; ``None`` means the last keys.
        scale: factor on the logits, in query.key units.
        is_causal: upper-left aligned causal mask, as in ``scaled_dot_product_attention``; excludes ``mask``.
        window: how many queries score, at least 1.

    Returns:
        float32 ``[batch, kv_heads, keys]``. The softmax of a query is over all keys that it sees, so the scores of one
        key/value head add up to 1.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a mask beside ``is_causal``; ``window`` below 1.
        NotImplementedError: a device without an implementation.
    """
    from avl_fx.kernels.visual_scores import IMPLEMENTATIONS

    _check(query, key, mask, positions, is_causal, window)
    return implementation("visual_scores", IMPLEMENTATIONS, query.device)(
        query, key, mask, positions, scale, is_causal, window
    )


@visual_scores.register_fake
def _(query, key, mask, positions, scale, is_causal, window):
    return query.new_empty(key.shape[:3], dtype=torch.float32)


def _check(
    query: Tensor, key: Tensor, mask: Tensor | None, positions: Tensor | None, is_causal: bool, window: int
) -> None:
    batch, heads, queries, head_dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or heads % key.shape[1] != 0 or key.shape[3] != head_dim:
        raise ValueError(f"key: {tuple(key.shape)} does not fit the query {tuple(query.shape)}.")
    if key.dtype != query.dtype or key.device != query.device:
        raise ValueError(f"key: {key.dtype} on {key.device} beside a query of {query.dtype} on {query.device}.")
    if key.stride(3) != 1:
        raise ValueError(f"key: its last dimension has stride {key.stride(3)}. Fix: make it contiguous.")
    if mask is not None:
        if is_causal:
            raise ValueError("mask: given beside is_causal. Fix: give one of them.")
        if mask.dim() != 4 or any(
            given not in allowed
            for given, allowed in zip(mask.shape, ((batch, 1), (heads, 1), (queries,), (key.shape[2],)), strict=True)
        ):
            wanted = (batch, heads, queries, key.shape[2])
            raise ValueError(f"mask: {tuple(mask.shape)} instead of {wanted}, where batch and heads may be 1.")
    if positions is not None and (positions.shape != (queries,) or positions.dtype != torch.int64):
        raise ValueError(f"positions: {tuple(positions.shape)}, {positions.dtype} instead of int64 [{queries}].")
    if window < 1:
        raise ValueError(f"window: {window}. Fix: let at least one query score.")
