"""`avl::survivors`: the tokens that the layers behind a prefill filter still run on (A-VL, arXiv 2409.14846, 4.2).

How many these are is data, so they have a size of their own. Batch rows that lose more than another are filled up with
tokens that they have lost, which `valid` marks: the layers behind the filter run on them and nobody sees them.
"""

import torch
from torch import Tensor

from avl_fx.kernels.dispatch import implementation

__all__ = ["survivors"]


@torch.library.custom_op("avl::survivors", mutates_args=())
def survivors(
    scores: Tensor, visual: Tensor, last_mask: Tensor | None, may_drop: Tensor, keep: float, tail: int
) -> tuple[Tensor, Tensor]:
    """Drop the visual tokens of a prompt that its end attends to least.

    Of the N visual tokens of a batch row the ``int(keep * N)`` best stay, equal scores going to the earlier token, and
    all of the last ``tail`` positions. Nothing is dropped where the mask hides a visual key from the last query, or
    weighs keys by their place: which keys are kept could not be told apart from that then.

    Args:
        scores: float32 ``[batch, kv_heads, tokens]``; their mean over heads counts.
        visual: bool ``[batch, tokens]``.
        last_mask: the last query's, ``[batch or 1, heads or 1, tokens]``, boolean (True = visible) or additive;
            ``None``: it sees every key.
        may_drop: int32 ``[1]``; 0: everything stays.
        keep: share of the visual tokens that stay, 0 < keep <= 1.
        tail: positions at the end that stay, at least 0 and at most ``tokens``.

    Returns:
        ``rows`` int64 ``[batch, left]``, positions in ascending order, and ``valid`` bool ``[batch, left]``, False for
        those that only fill up their batch row. ``left`` is what the batch row that loses least has left.

    Raises:
        ValueError: shapes or dtypes that do not fit; ``keep`` or ``tail`` out of range.
        NotImplementedError: a device without an implementation.
    """
    from avl_fx.kernels.survivors import IMPLEMENTATIONS

    _check(scores, visual, last_mask, may_drop, keep, tail)
    return implementation("survivors", IMPLEMENTATIONS, scores.device)(scores, visual, last_mask, may_drop, keep, tail)


@survivors.register_fake
def _(scores, visual, last_mask, may_drop, keep, tail):
    left = torch.library.get_ctx().new_dynamic_size(min=max(1, tail))
    sizes = (visual.shape[0], left)
    return visual.new_empty(sizes, dtype=torch.int64), visual.new_empty(sizes, dtype=torch.bool)


def _check(scores: Tensor, visual: Tensor, last_mask: Tensor | None, may_drop: Tensor, keep: float, tail: int) -> None:
    if visual.dim() != 2 or visual.dtype != torch.bool:
        raise ValueError(f"visual: {tuple(visual.shape)}, {visual.dtype} instead of bool [batch, tokens].")
    batch, tokens = visual.shape
    if scores.dim() != 3 or scores.shape[::2] != visual.shape or scores.dtype != torch.float32:
        raise ValueError(
            f"scores: {tuple(scores.shape)}, {scores.dtype} do not fit float32 [{batch}, heads, {tokens}]."
        )
    if last_mask is not None and (
        last_mask.dim() != 3 or last_mask.shape[0] not in (1, batch) or last_mask.shape[2] != tokens
    ):
        raise ValueError(f"last_mask: {tuple(last_mask.shape)} instead of [1 or {batch}, heads, {tokens}].")
    if may_drop.shape != (1,) or may_drop.dtype != torch.int32:
        raise ValueError(f"may_drop: {tuple(may_drop.shape)}, {may_drop.dtype} instead of int32 [1].")
    if not 0 < keep <= 1:
        raise ValueError(f"keep: {keep}. Fix: a share, above 0 and at most 1.")
    if not 0 <= tail <= tokens:
        raise ValueError(f"tail: {tail}. Fix: as many positions as there are, or fewer.")
