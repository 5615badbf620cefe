"""The figure that every gate compares."""

import math

import pytest
import torch

from benchmarks._difference import largest_difference


def test_it_is_the_largest_of_all_pairs():
    left = [torch.zeros(3), torch.tensor([1.0, -4.0, 0.0])]
    assert largest_difference(left, [torch.ones(3), torch.zeros(3)]) == 4
    with pytest.raises(ValueError, match="shorter"):
        largest_difference(left, [torch.ones(3)])


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_nothing_that_is_not_finite_passes(at, what):
    run = [torch.zeros(3) for _ in range(3)]
    run[at][1] = what
    assert not largest_difference(run, [torch.zeros(3)] * 3) <= 1e9
