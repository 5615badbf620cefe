"""Independent answers for the gate: stock eager models, in float32 or under the tests' oracle."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from benchmarks._decoding import PLAN, visual_positions
from tests.oracle.avl import avl_oracle

__all__ = ["float32_copy", "oracle"]


def float32_copy(model: Any) -> Any:
    """The same model with its parameters in float32."""
    exact = copy.deepcopy(model)
    for parameter in exact.parameters():
        parameter.data = parameter.data.float()
    return exact


def oracle(model: Any, rows: Sequence[int], visual: int) -> AbstractContextManager[Any]:
    """A block in which ``model``, run on so many ``rows``, follows `PLAN` as the tests' oracle does."""
    policy = PLAN.vision_policy
    assert policy is not None
    return avl_oracle(
        model,
        visual_positions(len(rows), visual),
        core=policy.core,
        secondary=policy.secondary,
        refresh=policy.refresh,
        text=1.0,
    )
