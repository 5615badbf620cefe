"""The choice of blocks: exact against brute force, and better than walking from layer to layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx.blocks import (
    Block,
    cheapest_blocks,
    cost_of,
    largest_within,
    most_weight,
    neighbours_under,
    weight_of,
)

INF = math.inf


def all_choices(layers: int) -> Iterator[tuple[Block, ...]]:
    """Every way to cut the layers into runs; runs of one layer are no blocks."""
    for cuts in itertools.product((False, True), repeat=layers - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), layers]
        yield tuple((a, b - 1) for a, b in itertools.pairwise(edges) if b - a > 1)


def symmetric(layers: int, upper: list[float]) -> list[list[float]]:
    values = iter(upper)
    matrix = [[0.0] * layers for _ in range(layers)]
    for a, b in itertools.combinations(range(layers), 2):
        matrix[a][b] = matrix[b][a] = next(values)
    return matrix


@st.composite
def matrices(draw: st.DrawFn) -> list[list[float]]:
    layers = draw(st.integers(1, 8))
    pairs = layers * (layers - 1) // 2
    # Dyadic, so that sums are exact in whatever order; a few pairs are not allowed.
    value = st.one_of(st.integers(0, 64).map(lambda n: n / 64), st.just(INF))
    return symmetric(layers, draw(st.lists(value, min_size=pairs, max_size=pairs)))


@settings(max_examples=150, deadline=None)
@given(matrix=matrices(), data=st.data())
def test_the_cheapest_of_enough_weight_is_what_brute_force_finds(matrix, data):
    layers = len(matrix)
    weights = data.draw(st.lists(st.integers(0, 3), min_size=layers, max_size=layers))
    least = data.draw(st.integers(0, sum(weights) + 1))
    enough = [c for c in all_choices(layers) if weight_of(weights, c) >= least and math.isfinite(cost_of(matrix, c))]
    found = cheapest_blocks(matrix, weights, least)
    if not enough:
        assert found is None
        assert least > most_weight(matrix, weights)
        return
    assert found in set(all_choices(layers))
    assert weight_of(weights, found) >= least
    cheapest = min((cost_of(matrix, c), weight_of(weights, c)) for c in enough)
    assert (cost_of(matrix, found), weight_of(weights, found)) == cheapest
    assert least <= most_weight(matrix, weights)


@settings(max_examples=150, deadline=None)
@given(matrix=matrices(), budget=st.integers(0, 256).map(lambda n: n / 64))
def test_the_largest_within_a_budget_is_what_brute_force_finds(matrix, budget):
    ones = [1] * len(matrix)
    allowed = [c for c in all_choices(len(matrix)) if cost_of(matrix, c) <= budget]
    most = max(weight_of(ones, c) for c in allowed)
    found = largest_within(matrix, budget)
    assert weight_of(ones, found) == most
    assert cost_of(matrix, found) == min(cost_of(matrix, c) for c in allowed if weight_of(ones, c) == most)


@settings(max_examples=100, deadline=None)
@given(matrix=matrices(), weights=st.lists(st.integers(0, 5), min_size=8, max_size=8))
def test_the_most_weight_is_what_brute_force_finds(matrix, weights):
    possible = [c for c in all_choices(len(matrix)) if math.isfinite(cost_of(matrix, c))]
    assert most_weight(matrix, weights) == max(weight_of(weights, c) for c in possible)


@settings(max_examples=100, deadline=None)
@given(matrix=matrices(), epsilon=st.floats(0, 1.1))
def test_walking_never_joins_what_may_not_and_never_more_than_exact(matrix, epsilon):
    walked = neighbours_under(matrix, epsilon)
    assert walked in set(all_choices(len(matrix)))
    cost, ones = cost_of(matrix, walked), [1] * len(matrix)
    assert math.isfinite(cost)
    for first, last in walked:
        assert all(matrix[n - 1][n] < epsilon for n in range(first + 1, last + 1))
    # For as many lazy layers, and within as large a cost, the exact choices are never worse.
    exact = cheapest_blocks(matrix, ones, weight_of(ones, walked))
    assert cost_of(matrix, exact) <= cost
    assert weight_of(ones, largest_within(matrix, cost)) >= weight_of(ones, walked)


def drifting(layers: int = 6, step: float = 0.125) -> list[list[float]]:
    """Each layer differs a little from the one before, and ever more from those further back."""
    return [[step * abs(a - b) for b in range(layers)] for a in range(layers)]


def test_walking_does_not_notice_a_drift_and_the_exact_choice_does():
    matrix = drifting()
    walked = neighbours_under(matrix, 0.2)
    assert walked == ((0, 5),)
    assert cost_of(matrix, walked) == 0.125 * (1 + 2 + 3 + 4 + 5)
    # Three lazy layers cost as little as three pairs; walking knows all of them or none.
    assert cheapest_blocks(matrix, [1] * 6, 3) == ((0, 1), (2, 3), (4, 5))
    assert neighbours_under(matrix, 0.125) == ()


def test_the_exact_choice_moves_an_anchor():
    # Layer 1 resembles everything, layer 0 only layer 1: as an anchor, layer 0 is expensive.
    matrix = symmetric(4, [0.25, 1, 1, 0.25, 0.25, 0.25])
    assert neighbours_under(matrix, 0.5) == ((0, 3),)
    assert cost_of(matrix, ((0, 3),)) == 2.25
    assert cheapest_blocks(matrix, [1] * 4, 2) == ((1, 3),)
    assert largest_within(matrix, 0.5) == ((1, 3),)


def test_heavy_layers_may_be_fewer():
    matrix = symmetric(4, [0.25, INF, INF, INF, INF, 0.5])
    assert cheapest_blocks(matrix, [1, 1, 1, 1], 1) == ((0, 1),)
    assert cheapest_blocks(matrix, [1, 1, 1, 4], 4) == ((2, 3),)
    assert cheapest_blocks(matrix, [1, 1, 1, 4], 5) == ((0, 1), (2, 3))


def test_what_cannot_be_reached():
    matrix = symmetric(3, [INF, INF, 0.5])
    assert most_weight(matrix, [1, 1, 1]) == 1
    assert cheapest_blocks(matrix, [1, 1, 1], 2) is None
    assert largest_within(matrix, 100.0) == ((1, 2),)
    assert largest_within(matrix, 0.25) == ()


@pytest.mark.parametrize("layers", [0, 1])
def test_nothing_to_share(layers):
    matrix = [[0.0] * layers for _ in range(layers)]
    assert neighbours_under(matrix, 1.0) == ()
    assert largest_within(matrix, 1.0) == ()
    assert cheapest_blocks(matrix, [1] * layers, 0) == ()


def test_a_budget_that_a_sum_reaches_exactly_is_kept():
    matrix = symmetric(4, [0.1, 0.2, 0.3, INF, INF, INF])
    assert largest_within(matrix, 0.1 + 0.2 + 0.3) == ((0, 3),)
    assert largest_within(matrix, 0.6) == ((0, 3),)


def test_a_hundred_layers_take_no_time():
    matrix = drifting(100, 1 / 128)
    assert weight_of([1] * 100, cheapest_blocks(matrix, [1] * 100, 45)) == 45
