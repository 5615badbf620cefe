"""The benchmark of half precision, at a tiny size."""

import pytest
import torch

from benchmarks import half_precision
from tests._compiler import needs_compiler

pytestmark = [needs_compiler, pytest.mark.matrix]


@pytest.mark.parametrize("dtype", half_precision.DTYPES.values(), ids=str)
def test_ratios_stand_behind_a_gate(dtype, monkeypatch):
    monkeypatch.setattr("avl_fx.kernels.narrow_linear.native.has_units", lambda dtype: False)
    monkeypatch.setattr(half_precision, "LAYERS", 1)
    monkeypatch.setattr(half_precision, "VISUAL", 16)
    row = half_precision.measure(dtype, 1, rounds=2, steps=half_precision.WARM_UP + 1)
    assert row["exact"]
    assert row["prompt"]["identity"]["over_baseline"] > 0
    assert row["step"]["Inductor"]["count"] == 2
    monkeypatch.setattr(half_precision, "AS_NEAR", 0.0)
    row = half_precision.measure(dtype, 1, rounds=2, steps=half_precision.WARM_UP + 1)
    assert "over_baseline" not in row["step"]["identity"]
    torch._dynamo.reset()
