"""`avl::inherited_decode`: one decode step's attention of a lazy layer, with logits that its anchor has computed.

Where all logits are inherited (mode ``gla``) no key is read: a lazy layer's step costs its values alone. Where those
against visual keys are (mode ``vla_scores``), keys are read for the rest, and one softmax covers both. Where the visual
keys themselves are (mode ``vla``), they are read from the anchor's cache. In no mode does a lazy layer need visual keys
of its own.
"""

import torch
from torch import Tensor

from avl_fx.kernels.dispatch import implementation, keep_in_python
from avl_fx.kernels.partitioned_decode.capacity import check_spare_row
from avl_fx.kernels.partitioned_decode.schema import check, check_ranges, check_rows

__all__ = ["inherited_decode"]

NAME = "avl::inherited_decode"


def inherited_decode(
    logits: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    inherited: Tensor | None,
    scale: float,
    anchor_key: Tensor | None = None,
) -> Tensor:
    """Attention of one query per batch row with logits, or keys, of another layer (arXiv 2602.01901, on decoding).

    Args:
        logits: float32 ``[batch, heads, K']``, scaled and masked, as `avl::anchor_decode` returns them; NaN or anything
            else may stand where they are not inherited or not read. ``None`` exactly when ``anchor_key`` is given.
        query: ``[batch, heads, 1, head_dim]``; ``None`` exactly when ``key`` and ``inherited`` are: then every logit is
            inherited.
        key: ``[batch, kv_heads, rows, head_dim]`` with ``rows <= keys``, strided as `avl::partitioned_decode` takes it.
            The first ``keys - rows`` inherited keys of each batch row have no row here (there must be so many); all
            others have one, in order. Rows that are inherited may hold anything.
        value: ``[batch, kv_heads, keys, value_dim]``, with ``heads % kv_heads == 0``; float32, bfloat16 or float16 (the
            reference also takes float64), which is the dtype of the result, too.
        new_key: ``[batch, kv_heads, 1, head_dim]``, stored behind the last row of ``key`` and attended to.
        new_value: ``[batch, kv_heads, 1, value_dim]``, stored behind the last row of ``value``: K' = ``keys + 1``.
            Given exactly when ``new_key`` is, where there is a key.
        mask: broadcastable to ``[batch, heads, 1, K']``; boolean (True = visible) or additive. Hides keys, inherited
            ones too; what it adds, it adds to the layer's own logits only.
        segments: int64 ``[batch, S, 2]``, the key ranges that a batch row reads, as of `avl::partitioned_decode`.
        inherited: int64 ``[batch, T, 2]`` with T <= 256: ranges of the keys whose logits are inherited, as (start >= 0,
            length), without overlap, in any order, clipped to K'; length 0 marks an unused entry.
        scale: factor on the layer's own logits.
        anchor_key: ``[batch, kv_heads, theirs, head_dim]`` with ``theirs <= K'``, strided in any way with a contiguous
            last dimension: the keys that ``query`` is multiplied with where ``inherited`` says so, in place of ``key``.
            Ranges are clipped to ``theirs`` then.

    Returns:
        ``[batch, heads, 1, value_dim]`` in the dtype of ``value``: zeros for a row that sees no key.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a new row without room behind the last one.
        NotImplementedError: a device without an implementation.

    The new rows are stored as `avl::partitioned_decode` stores them, under the same promises of the caller.
    """
    from avl_fx.kernels.inherited_decode import IMPLEMENTATIONS

    _check(logits, query, key, value, new_key, new_value, segments, inherited, anchor_key)
    return implementation("inherited_decode", IMPLEMENTATIONS, value.device)(
        logits, query, key, value, new_key, new_value, mask, segments, inherited, scale, anchor_key
    )


torch.library.define(
    NAME,
    torch.library.infer_schema(inherited_decode, mutates_args=()),
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
torch.library.impl(NAME, "CompositeExplicitAutograd")(inherited_decode)


@torch.library.register_fake(NAME)
def _(logits, query, key, value, new_key, new_value, mask, segments, inherited, scale, anchor_key=None):
    batch, heads = (query if logits is None else logits).shape[:2]
    return value.new_empty((batch, heads, 1, value.shape[-1]))


def _check(
    logits: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    segments: Tensor | None,
    inherited: Tensor | None,
    anchor_key: Tensor | None,
) -> None:
    if (logits is None) == (anchor_key is None):
        raise ValueError("logits, anchor_key: exactly one of them is inherited. Fix: give it, and leave out the other.")
    if (query is None) != (key is None) or (query is None) != (inherited is None):
        raise ValueError("query, key, inherited: only some are given. Fix: give all of them, or none to inherit all.")
    batch, kv_heads, keys, _ = value.shape
    if query is not None and key is not None:
        if key.shape[2] > keys:
            raise ValueError(f"key: {key.shape[2]} rows for {keys} values. Fix: leave out inherited keys only.")
        beside = value if key.shape[2] == keys else value[:, :, : key.shape[2]]
        check(query, key, beside, new_key, new_value, segments, None)
    elif new_key is not None:
        raise ValueError("new_key: without a key. Fix: leave it out where every logit is inherited.")
    else:
        check_rows("value", value, new_value)
        check_ranges("segments", segments, batch)
    seen = keys + (new_value is not None)
    if anchor_key is not None:
        _check_anchor_key(anchor_key, query, value, seen)
    heads = query.shape[1] if query is not None else 0 if logits is None or logits.dim() != 3 else logits.shape[1]
    wrong = logits is not None and (logits.shape != (batch, heads, seen) or logits.dtype != torch.float32)
    if wrong or heads % kv_heads != 0:
        got = "none" if logits is None else f"{tuple(logits.shape)}, {logits.dtype}"
        raise ValueError(
            f"logits: {got} instead of float32 [{batch}, heads, {seen}] with heads a multiple of {kv_heads}, those of "
            "the query."
        )
    check_ranges("inherited", inherited, batch)
    for name, tensor in (("logits", logits), ("segments", segments), ("inherited", inherited)):
        if tensor is not None and tensor.device != value.device:
            raise ValueError(f"{name}: on {tensor.device}, and the values on {value.device}. Fix: move them together.")


def _check_anchor_key(anchor_key: Tensor, query: Tensor | None, value: Tensor, seen: int) -> None:
    if query is None:
        raise ValueError("anchor_key: without a query. Fix: give the query, or the anchor's logits instead.")
    batch, kv_heads = value.shape[:2]
    fits = anchor_key.dim() == 4 and anchor_key.shape == (batch, kv_heads, anchor_key.shape[2], query.shape[3])
    if not fits or anchor_key.shape[2] > seen or (anchor_key.dtype, anchor_key.device) != (query.dtype, query.device):
        raise ValueError(
            f"anchor_key: {tuple(anchor_key.shape)}, {anchor_key.dtype} on {anchor_key.device} instead of "
            f"[{batch}, {kv_heads}, at most {seen}, {query.shape[3]}], {query.dtype} on {query.device}."
        )
    check_rows("anchor_key", anchor_key, None)


def _error(logits, query, key, value, new_key, new_value, mask, segments, inherited, scale, anchor_key=None) -> str:
    """What `inherited_decode` would raise, in words; empty: nothing."""
    try:
        _check(logits, query, key, value, new_key, new_value, segments, inherited, anchor_key)
        for cache, row in ((key, new_key), (value, new_value)):
            if cache is not None and row is not None:
                check_spare_row(cache)
        if mask is not None:
            heads = (query if logits is None else logits).shape[1]
            mask.expand(value.shape[0], heads, 1, value.shape[2] + (new_value is not None))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


keep_in_python(NAME, inherited_decode, _error)
