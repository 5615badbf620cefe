"""Scores of keys by the last queries of a prompt: schema, reference, and one implementation a device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avl_fx.kernels.visual_scores.cpu import visual_scores_cpu
from avl_fx.kernels.visual_scores.reference import visual_scores_reference
from avl_fx.kernels.visual_scores.schema import visual_scores

__all__ = ["IMPLEMENTATIONS", "visual_scores", "visual_scores_reference"]


def _cuda(*args: Any) -> Tensor:
    from avl_fx.kernels.visual_scores.triton import visual_scores_triton

    with torch.cuda.device_of(args[0]):
        return visual_scores_triton(*args)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "cpu": visual_scores_cpu,
    "cuda": _cuda,
}
"""Device type -> implementation (ROCm devices are of type "cuda" as well). Triton is imported at the first call."""
