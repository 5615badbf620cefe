"""Core, secondary and minor from scores; and what is spread over the images lies evenly, in each layer elsewhere."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx.zones import spread_order, spread_out, zones


def order_of(keys, layers=(0,), heads=1):
    return spread_order(torch.arange(keys).expand(len(layers), 1, heads, keys), layers)


def first(order, count):
    """The `count` keys that are taken first, ascending."""
    return order.flatten().sort().indices[:count].sort().values.tolist()


@given(keys=st.integers(2, 3000), layer=st.integers(0, 100), data=st.data())
@settings(max_examples=200, deadline=None)
def test_however_many_are_taken_they_lie_evenly(keys, layer, data):
    """Three distances at most between neighbours, none more than about two and a half times the mean (Steinhaus)."""
    count = data.draw(st.integers(1, keys))
    taken = first(order_of(keys, (layer,)), count)
    gaps = {right - left for left, right in itertools.pairwise(taken)}
    assert len(gaps) <= 3
    assert max(gaps, default=0) <= 2.7 * keys / count + 1


def test_layers_and_heads_take_others():
    order = order_of(576, layers=range(4), heads=2)
    sets = [set(first(row, 144)) for row in order.flatten(0, 2)]
    assert len(set.union(*sets)) > 0.85 * 576, "a random choice would leave out a tenth"
    for one, other in itertools.combinations(sets, 2):
        assert one != other


def test_no_two_keys_have_the_same_turn():
    order = order_of(20_000, layers=(31,))
    assert len(order.unique()) == 20_000


@pytest.mark.parametrize("spread", [0.0, 0.25, 1.0])
def test_sizes_are_kept_and_rows_that_are_not_there_are_minor(spread):
    scores = torch.rand(3, 2, 1, 40, generator=torch.Generator().manual_seed(0))
    scores[:, 1, :, 30:] = -torch.inf
    core, secondary = torch.tensor([8, 6]), torch.tensor([20, 15])
    order = spread_order(torch.arange(40).expand(scores.shape), (0, 1, 2))
    zone = zones(spread_out(scores, secondary, spread, order), core, secondary)
    for row in range(2):
        assert ((zone[:, row] == 0).sum(-1) == core[row]).all()
        assert ((zone[:, row] <= 1).sum(-1) == secondary[row]).all()
    assert (zone[:, 1, :, 30:] == 2).all()
    if spread == 0:
        assert torch.equal(zone, zones(scores, core, secondary))
    if spread == 1:  # scores only choose core
        taken = [set(first(order[layer, 0], 20)) for layer in range(3)]
        assert [set((zone[layer, 0, 0] <= 1).nonzero().flatten().tolist()) for layer in range(3)] == taken


def test_a_batch_row_of_nothing():
    nothing, none = torch.full((1, 1, 1, 1), -torch.inf), torch.tensor([0])
    spread = spread_out(nothing, none, 0.5, torch.zeros(1, 1, 1, 1, dtype=torch.int64))
    assert zones(spread, none, none) == 2
