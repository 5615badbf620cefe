"""`avl_backend` around the passes: what happens when one of them fails, and what it writes down."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import avl_fx.backend
from avl_fx import Plan, avl_backend
from avl_fx.errors import InternalError, OptionError, PlanError, PlanMismatchError, UnsupportedPlanError
from avl_fx.passes.context import PassContext
from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.pipeline import STAGES, run_stages
from avl_fx.passes.site import PassResult, Status
from avl_fx.record import recording


class Model(nn.Module):
    """Two layers of grouped attention in place of a decoder, with a cache that they write."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, keys)
        return x


class Layer(nn.Module):
    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        query = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        key = self.kv(x).unflatten(-1, (2, 4)).transpose(1, 2)
        keys[:, :, : key.shape[2]] = key
        full = keys.repeat_interleave(2, dim=1)
        return x + F.scaled_dot_product_attention(query, full, full).transpose(1, 2).flatten(2)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 16, generator=generator), torch.randn(2, 2, 5, 4, generator=generator)


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=avl_backend, options={"compiler": "eager", **options})


@pytest.fixture
def half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline rewrites all attention, takes a write away, and breaks."""

    def vandal(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        for node in [n for n in gm.graph.nodes if "setitem" in n.name]:
            gm.graph.erase_node(node)
        raise ValueError("a pass is broken")

    def run(gm: fx.GraphModule, ctx: PassContext) -> list[PassResult]:
        return run_stages(gm, ctx, (find_attention, vandal, *STAGES[1:]))

    monkeypatch.setattr(avl_fx.backend, "run_stages", run)


def test_the_untouched_graph_runs_when_a_pass_fails(half_done: None, caplog: pytest.LogCaptureFixture) -> None:
    model, (x, keys), (_, mine) = Model(), inputs(), inputs()
    wanted = model(x, keys)
    with recording() as recorder, caplog.at_level(logging.WARNING, "avl_fx"):
        got = compiled(model)(x, mine)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(mine, keys)
    (record,) = recorder.graphs
    assert record.failure == "ValueError: a pass is broken"
    assert not record.sites, "nothing was rewritten, nothing is claimed"
    assert not record.dropped_keys
    assert sum("a pass failed" in r.message for r in caplog.records) == 1


def test_strict_raises_instead(half_done: None) -> None:
    with pytest.raises(InternalError, match="a pass is broken"):
        compiled(Model(), strict=True)(*inputs())


def test_a_broken_rule_is_a_failure_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        for node in [n for n in gm.graph.nodes if "setitem" in n.name]:
            gm.graph.erase_node(node)
        return PassResult("forgetful")

    monkeypatch.setattr(avl_fx.backend, "run_stages", lambda gm, ctx: run_stages(gm, ctx, (forgetful,)))
    (x, keys), (_, mine) = inputs(), inputs()
    model = Model()
    model(x, keys)
    with recording() as recorder:
        compiled(model)(x, mine)
    torch.testing.assert_close(mine, keys)
    assert "forgetful: in-place writes were lost" in str(recorder.graphs[0].failure)


def test_without_a_failure_every_site_is_recorded() -> None:
    model, (x, keys), (_, mine) = Model(), inputs(), inputs()
    wanted = model(x, keys)
    with recording() as recorder:
        got = compiled(model, strict=True)(x, mine)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(mine, keys)
    (record,) = recorder.graphs
    assert [s.status for s in record.sites] == [Status.REWRITTEN] * 2
    assert [s.layer for s in record.sites] == [0, 1]
    assert [p.name for p in record.passes] == [s.__name__ for s in STAGES]
    assert record.failure is None
    assert record.calls == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"plan": {"lazy": {"blocks": [[1, 0]]}}}, PlanError),
        ({"plan": {"prefill": {}}}, UnsupportedPlanError),
        ({"plan": Plan.lazy([(0, 1)], num_layers=3)}, PlanMismatchError),
        ({"nonsense": 1}, OptionError),
    ],
    ids=["invalid", "unsupported", "another depth", "unknown option"],
)
def test_mistakes_of_the_user_are_raised_not_logged(options: dict[str, Any], error: type[Exception]) -> None:
    """They are no failure of a pass: falling back would hide them."""
    with pytest.raises(error):
        compiled(Model(), **options)(*inputs())


def test_graphs_are_written_before_and_after(tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    for _ in range(2):
        compiled(Model(), dump=folder)(*inputs())
    names = sorted(file.name for file in folder.iterdir())
    assert names == [f"graph_00{i}_{when}.py" for i in range(2) for when in ("after", "before")]
    before, after = ((folder / f"graph_000_{when}.py").read_text() for when in ("before", "after"))
    assert "repeat_interleave" in before
    assert "repeat_interleave" not in after
    assert "enable_gqa" in after
