"""Linear layers on a few rows: which ones are taken, and that they stay what they were."""

import pytest
import torch
from torch import nn

from avl_fx.kernels.narrow_linear import MAX_ROWS
from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import op
from avl_fx.passes.pipeline import run_stages
from avl_fx.plan import Plan
from tests._compiler import needs_compiler
from tests.passes._graphs import check, rewrite

pytestmark = needs_compiler


def rows(*shape, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), **kwargs)


def narrow(rewritten):
    return sum(op(n) == "narrow_linear" for n in rewritten.gm.graph.nodes)


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8, bias=False)).requires_grad_(False)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 1, 16), (2, 4, 16), (MAX_ROWS, 16)])
def test_few_rows_are_taken(layers, shape):
    rewritten = check(layers, rows(*shape))
    assert narrow(rewritten) == rewritten.result("narrow_linears").count == 2


@pytest.mark.parametrize("shape", [(MAX_ROWS + 1, 16), (MAX_ROWS // 4 + 1, 4, 16)])
def test_many_rows_are_left(layers, shape):
    assert narrow(check(layers, rows(*shape))) == 0


def test_a_symbolic_number_of_rows(layers):
    """Captured with few rows; called with many, the operator is an ordinary product."""
    seen = []

    def backend(gm, inputs):
        ctx = PassContext(Plan.identity())
        run_stages(gm, ctx)
        seen.append(sum(op(n) == "narrow_linear" for n in gm.graph.nodes))
        return gm.forward

    compiled = torch.compile(layers, backend=backend, dynamic=True)
    for number in (4, 3, 50):
        torch.testing.assert_close(compiled(rows(number, 16)), layers(rows(number, 16)))
    assert seen == [2]


def test_gradients_need_the_ordinary_product(layers):
    assert narrow(check(layers, rows(2, 16, requires_grad=True))) == 0
    assert narrow(check(layers.requires_grad_(True), rows(2, 16))) == 0
    with torch.no_grad():
        assert narrow(check(layers, rows(2, 16))) == 2


def test_float64_is_left(layers):
    assert narrow(rewrite(layers.double(), rows(2, 16).double())) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_taken_where_the_processor_has_no_units_for_it(layers, dtype, monkeypatch):
    for units in (False, True):
        monkeypatch.setattr("avl_fx.kernels.narrow_linear.native.has_units", lambda dtype, units=units: units)
        for number in (2, MAX_ROWS + 1):
            rewritten = check(layers.to(dtype), rows(number, 16).to(dtype), dtype=dtype)
            assert narrow(rewritten) == (0 if units else 2)


def test_without_a_compiler_nothing_changes(layers, monkeypatch):
    monkeypatch.setattr("avl_fx.passes.narrow_linears.is_available", lambda: False)
    assert narrow(check(layers, rows(2, 16))) == 0
