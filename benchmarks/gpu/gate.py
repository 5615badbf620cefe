"""The correctness gate: nothing is said about the speed of a contender whose results are wrong.

Logits are held against an independent model in float32: stock eager attention for what attends to everything, the
masks-only oracle of the tests for what follows a plan. In half precision nobody equals float32. A contender may be at
most three times as far off as *plain eager code of the same dtype* is (stock, or that oracle), and by one rounding step
of the largest logit beyond that.

The gate of a plan must also be able to tell: it fails where dense attention would pass it. In half precision it could
not. Among thousands of random keys some are as good as equal at the edge of core, rounding decides between them, and of
random values each one counts: two right implementations end up as far apart as sparse and dense attention. So what
follows a plan is run in float32 as well, over its first steps, and has to be exact there (`both`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Reference", "both", "verdict"]

FACTOR = 3
FLOAT32_FLOOR = 2e-4


@dataclass(frozen=True)
class Reference:
    """What results are held against."""

    against: str
    """For people."""
    exact: Tensor
    """Logits in float32, any shape."""
    plain: Tensor
    """The same by plain eager code in the dtype that is measured."""
    dense: Tensor | None = None
    """What dense attention gives in float32, where ``exact`` follows a plan."""


def verdict(got: Tensor, reference: Reference, dtype: torch.dtype) -> dict[str, Any]:
    """Whether ``got`` is right, and how that was found out; as plain data."""
    own = _distance(reference.plain, reference.exact)
    floor = max(FLOAT32_FLOOR, torch.finfo(dtype).eps * reference.exact.abs().max().item())
    allowed = FACTOR * own + floor
    error = _distance(got, reference.exact)
    found = {
        "against": reference.against,
        "error": error if math.isfinite(error) else None,
        "plain_error": own,
        "allowed": allowed,
        "passed": error <= allowed,
    }
    if reference.dense is not None:
        found["dense_error"] = _distance(reference.dense, reference.exact)
        if found["dense_error"] <= 2 * allowed:
            found |= {"passed": False, "reason": "dense attention would pass as well: the gate tells nothing"}
    if not found["passed"]:
        found.setdefault("reason", f"off by {error:.3g}, {allowed:.3g} is allowed")
    return found


def both(exactly: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """The verdict on a contender from those on its run in float32 and on the one whose time was taken."""
    failed = next((found for found in (exactly, measured) if not found["passed"]), None)
    parts = {"passed": failed is None, "float32": exactly, "measured": measured}
    return parts if failed is None else parts | {"reason": failed["reason"]}


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; anything that is not a number counts as infinite."""
    largest = (a.to(b.device, torch.float32) - b).abs().max().item()
    return largest if largest == largest else float("inf")
