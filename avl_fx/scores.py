"""What a call says of its keys: the scores of a prompt, or the softmax rows of a decode step, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from avl_fx._compat import sum_over

__all__ = ["Scores"]


@dataclass(frozen=True)
class Scores:
    """Scores of the layers of one call."""

    own: Mapping[int, Tensor]
    """Layer -> float32 ``[batch, kv_heads, keys]``, of this process's heads."""
    group: str | None = None
    """Process group that has the rest of the heads; ``None``: there are no others."""

    @cached_property
    def shared(self) -> Mapping[int, Tensor]:
        """Layer -> scores to be averaged over dim 1; the same in every process.

        With a ``group`` one collective is issued for all layers, when this is first asked for. So each process has to
        ask at the same calls.
        """
        if self.group is None or not self.own:
            return self.own
        means = {layer: rows.mean(1, keepdim=True) for layer, rows in self.own.items()}
        total, processes = sum_over(self.group, torch.cat([rows.flatten() for rows in means.values()]))
        parts = (total / processes).split([rows.numel() for rows in means.values()])
        return {layer: part.view_as(rows) for part, (layer, rows) in zip(parts, means.items(), strict=True)}

    def by(self, kind: str) -> Mapping[int, Tensor]:
        """What ranks visual keys under `VisionPolicy.scores` ``kind``: ``shared`` or ``per_kv_head``."""
        return self.shared if kind == "shared" else self.own
