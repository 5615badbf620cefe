"""Which keys are visual: a later turn without images has those of before, and one whose images were not placed none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from avl_fx.passes import visual_inputs
from avl_fx.passes.context import VisualSource
from avl_fx.passes.site import Reason
from avl_fx.plan import Plan
from tests.passes._decoder import WIDTH, Decoder, hidden_states, inheriting, specs
from tests.passes._graphs import assert_same, check, rewrite

ATTENTION = torch.add
"""Any call stands for attention: only its second argument is looked at."""


@pytest.mark.parametrize(("shown", "known"), [(None, True), (VisualSource("discovered", None), False)])
def test_a_later_turn(shown, known, monkeypatch):
    graph = fx.Graph()
    key, past = graph.placeholder("key"), graph.placeholder("past")
    node = graph.call_function(ATTENTION, (key, key))
    ctx: Any = SimpleNamespace(visual=shown)
    monkeypatch.setattr(visual_inputs, "starts_cache", lambda key: False)
    monkeypatch.setattr(visual_inputs, "new_flags", lambda gm, ctx: (None, ()))
    monkeypatch.setattr(visual_inputs, "past_ranges", lambda gm, ctx: (past, ("past",)))
    monkeypatch.setattr(visual_inputs, "insert_traced", lambda node, function, ranges, like: ranges)
    flags, added = visual_inputs.key_flags(fx.GraphModule({}, graph), ctx, SimpleNamespace(node=node))  # type: ignore[arg-type]
    assert flags is (past if known else None)
    assert added == ("past",)


# ---- features that are added in front of several layers --------------------------------------------------------------

IMAGE, FILM = 1, 2
IDS = torch.tensor([[0, IMAGE, IMAGE, 0, FILM, 0, 0, 0], [0, 0, IMAGE, IMAGE, IMAGE, 0, FILM, 0]])
CAUSAL = torch.ones(8, 8, dtype=torch.bool).tril().repeat(2, 1, 1, 1)


class Deep(Decoder):
    """Adds features in front of the first two of three layers, in front of the second at ``token``."""

    def __init__(self, token: int) -> None:
        super().__init__(specs(3))
        self.token = token

    def forward(self, x: Tensor, ids: Tensor, features: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        visual = (ids == IMAGE)[..., None].expand_as(x)
        stored = []
        for number, layer in enumerate(self.each()):
            if number == 1 and self.token != IMAGE:
                visual = (ids == self.token)[..., None].expand_as(x)
            if number < 2:
                x = x + torch.zeros_like(x).masked_scatter(visual.to(x.device), features)
            x, pair = layer(x, mask, ("first",), None)
            stored += pair
        return x, stored


def deep(token: int) -> tuple[Deep, tuple[Tensor, ...]]:
    features = torch.randn(int((IDS == IMAGE).sum()), WIDTH, generator=torch.Generator().manual_seed(1))
    return Deep(token).eval(), (hidden_states(8), IDS, features, CAUSAL)


@pytest.mark.parametrize("mode", ["vla", "vla_scores"])
@torch.no_grad()
def test_one_mask_in_front_of_several_layers(mode: str) -> None:
    """Each layer moves it to where it is itself, as Granite 4 Vision does: it is known before the first."""
    model, inputs = deep(IMAGE)
    x, ids, features, mask = inputs

    def added(number: int, hidden: Tensor) -> Tensor:
        there = (ids == IMAGE)[..., None]
        return hidden + torch.zeros_like(hidden).masked_scatter(there, features) if number < 2 else hidden

    wanted = inheriting(model, mode, x, ids == IMAGE, mask, before=added)
    assert (wanted[0] - model(*inputs)[0]).abs().max() > 0.1
    rewritten = rewrite(model, *inputs, plan=Plan.lazy([(0, 2)], mode))
    assert rewritten.reasons == [None] * 3
    assert_same(rewritten.outputs, wanted)


@pytest.mark.parametrize("mode", ["vla", "vla_scores"])
@torch.no_grad()
def test_positions_that_show_behind_the_first_layer_are_not_known(mode: str) -> None:
    model, inputs = deep(FILM)
    rewritten = check(model, *inputs, plan=Plan.lazy([(0, 2)], mode))
    assert rewritten.reasons == [None, Reason.VISUAL_UNKNOWN, Reason.VISUAL_UNKNOWN]
