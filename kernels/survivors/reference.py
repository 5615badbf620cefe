"""The obvious implementation: one batch row after the other, tokens as Python numbers."""

import torch
from torch import Tensor


def survivors_reference(
    scores: Tensor, visual: Tensor, last_mask: Tensor | None, may_drop: Tensor, keep: float, tail: int
) -> tuple[Tensor, Tensor]:
    """Reference of `avl::survivors`; see the schema for shapes."""
    batch, tokens = visual.shape
    dropped: list[list[int]] = []
    for row in range(batch):
        images = visual[row].nonzero().flatten().tolist()
        mean = scores[row].mean(0).tolist()
        candidates = sorted((j for j in images if j < tokens - tail), key=lambda j: (mean[j], -j))
        dropped.append(candidates[: len(images) - int(keep * len(images))])
    if not int(may_drop) or not _free(visual, last_mask):
        dropped = [[] for _ in dropped]
    fewest = min(map(len, dropped))
    rows, valid = [], []
    for out in dropped:
        fillers = sorted(out)[: len(out) - fewest]
        rows.append([j for j in range(tokens) if j not in out or j in fillers])
        valid.append([j not in fillers for j in rows[-1]])
    device = visual.device
    return torch.tensor(rows, dtype=torch.int64, device=device), torch.tensor(valid, dtype=torch.bool, device=device)


def _free(visual: Tensor, last_mask: Tensor | None) -> bool:
    """Whether the mask shows all visual keys, and either shows or hides every other one."""
    if last_mask is None:
        return True
    for row, flags in enumerate(visual.tolist()):
        for head in last_mask[row % len(last_mask)].tolist():
            for bias, is_visual in zip(head, flags, strict=True):
                lowest = 0.5 if isinstance(bias, bool) else torch.finfo(last_mask.dtype).min / 2
                hidden = bias <= lowest
                if (hidden and is_visual) or not (hidden or isinstance(bias, bool) or bias == 0):
                    return False
    return True
