"""Which keys are visual: a later turn without images has those of before, and one whose images were not placed none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx

from avl_fx.passes import visual_inputs
from avl_fx.passes.context import VisualSource

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
