"""`avl::inherited_decode`: one decode step's attention of a lazy layer, with logits that its anchor has computed.

Where all logits are inherited (mode ``gla``) no key is read: a lazy layer's step costs its values alone. Where those
against visual keys are (mode ``vla_scores``), keys are read for the rest, and one softmax covers both.
"""

import torch
from torch import Tensor

from avl_fx.kernels.dispatch import implementation
from avl_fx.kernels.partitioned_decode.schema import check, check_ranges, check_rows

__all__ = ["inherited_decode"]

NAME = "avl::inherited_decode"


def inherited_decode(
    logits: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    inherited: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of one query per batch row with logits of another layer (arXiv 2602.01901, section on decoding).

    Args:
        logits: float32 ``[batch, heads, K']``, scaled and masked, as `avl::anchor_decode` returns them; NaN or anything
            else may stand where they are not inherited or not read.
        query: ``[batch, heads, 1, head_dim]``; ``None`` exactly when ``key`` and ``inherited`` are: then every logit is
            inherited.
        key: ``[batch, kv_heads, keys, head_dim]``, strided as `avl::partitioned_decode` takes it. Rows that are
            inherited may hold anything.
        value: ``[batch, kv_heads, keys, value_dim]``, with ``heads % kv_heads == 0``; float32, bfloat16 or float16 (the
            reference also takes float64), which is the dtype of the result, too.
        new_key: ``[batch, kv_heads, 1, head_dim]``, stored behind the last row of ``key`` and attended to.
        new_value: ``[batch, kv_heads, 1, value_dim]``, stored behind the last row of ``value``: K' = ``keys + 1``.
            Given exactly when ``new_key`` is, where there is a key.
        mask: broadcastable to ``[batch, heads, 1, K']``; boolean (True = visible) or additive. Hides keys, inherited
            ones too; what it adds, it adds to the layer's own logits only.
        segments: int64 ``[batch, S, 2]``, the key ranges that a batch row reads, as of `avl::partitioned_decode`.
        inherited: int64 ``[batch, T, 2]`` with T <= 64: ranges of the keys whose logits are inherited, as (start >= 0,
            length), without overlap, in any order, clipped to K'; length 0 marks an unused entry.
        scale: factor on the layer's own logits.

    Returns:
        ``[batch, heads, 1, value_dim]`` in the dtype of ``value``: zeros for a row that sees no key.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a new row without room behind the last one.
        NotImplementedError: a device without an implementation.

    The new rows are stored as `avl::partitioned_decode` stores them, under the same promises of the caller.
    """
    from avl_fx.kernels.inherited_decode import IMPLEMENTATIONS

    _check(logits, query, key, value, new_key, new_value, segments, inherited)
    return implementation("inherited_decode", IMPLEMENTATIONS, value.device)(
        logits, query, key, value, new_key, new_value, mask, segments, inherited, scale
    )


torch.library.define(
    NAME,
    torch.library.infer_schema(inherited_decode, mutates_args=()),
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
torch.library.impl(NAME, "CompositeExplicitAutograd")(inherited_decode)


@torch.library.register_fake(NAME)
def _(logits, query, key, value, new_key, new_value, mask, segments, inherited, scale):
    batch, heads, _ = logits.shape
    return value.new_empty((batch, heads, 1, value.shape[-1]))


def _check(
    logits: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    segments: Tensor | None,
    inherited: Tensor | None,
) -> None:
    if (query is None) != (key is None) or (query is None) != (inherited is None):
        raise ValueError("query, key, inherited: only some are given. Fix: give all of them, or none to inherit all.")
    batch, kv_heads, keys, _ = value.shape
    if query is not None and key is not None:
        check(query, key, value, new_key, new_value, segments, None)
    elif new_key is not None:
        raise ValueError("new_key: without a key. Fix: leave it out where every logit is inherited.")
    else:
        check_rows("value", value, new_value)
        check_ranges("segments", segments, batch)
    seen = keys + (new_value is not None)
    heads = logits.shape[1] if logits.dim() == 3 and query is None else 0 if query is None else query.shape[1]
    if logits.shape != (batch, heads, seen) or logits.dtype != torch.float32 or heads % kv_heads != 0:
        raise ValueError(
            f"logits: {tuple(logits.shape)}, {logits.dtype} instead of float32 [{batch}, heads, {seen}] with heads a "
            f"multiple of {kv_heads}, those of the query."
        )
    check_ranges("inherited", inherited, batch)
    for name, tensor in (("logits", logits), ("segments", segments), ("inherited", inherited)):
        if tensor is not None and tensor.device != value.device:
            raise ValueError(f"{name}: on {tensor.device}, and the values on {value.device}. Fix: move them together.")
