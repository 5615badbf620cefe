"""`avl::survivors` by tensor operators, for every device."""

import torch
from torch import Tensor

from avl_fx.kernels.last_mask import seen_keys, weighs_keys


def survivors_aten(
    scores: Tensor, visual: Tensor, last_mask: Tensor | None, may_drop: Tensor, keep: float, tail: int
) -> tuple[Tensor, Tensor]:
    """`avl::survivors`; see the schema for shapes."""
    batch, tokens = visual.shape
    position = torch.arange(tokens, device=visual.device)
    candidates = visual & (position < tokens - tail)
    count = visual.sum(1)
    lost = torch.minimum(count - (count.double() * keep).long(), candidates.sum(1))
    lost = lost * (int(may_drop) and _order_is_free(visual, last_mask))
    # The best first, equal ones by their place; then those that cannot be dropped.
    ranked = scores.mean(1).masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = ranked.argsort(dim=1)
    stay = (candidates.sum(1) - lost)[:, None]
    dropped = candidates & (rank >= stay)
    fewest = lost.min() if batch else lost.sum()
    fillers = dropped & (dropped.cumsum(1) <= (lost - fewest)[:, None])
    kept = ~dropped | fillers
    rows = kept.nonzero()[:, 1].clone().view(batch, -1)  # a tensor of its own, as promised
    return rows, ~fillers.gather(1, rows)


def _order_is_free(visual: Tensor, last_mask: Tensor | None) -> bool:
    if last_mask is None:
        return True
    tokens = visual.shape[1]
    return bool((seen_keys(last_mask, tokens) | ~visual).all()) and not weighs_keys(last_mask, tokens)
