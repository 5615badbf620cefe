"""Intervals: they cover what they should, and groups make them as wide as they are."""

import math

import pytest
import torch

from avl_fx._bootstrap import mean_interval


def test_equal_values_have_no_spread():
    interval = mean_interval([0.25] * 9)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))


def test_it_is_the_normal_interval_of_many_values():
    values = (torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.3).double().tolist()
    interval = mean_interval(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 4000)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)
    assert interval.low < interval.mean < interval.high


def test_copies_of_a_sample_are_no_evidence():
    """Ten questions about a picture that are always answered alike are one observation."""
    pictures = (torch.rand(100, generator=torch.Generator().manual_seed(2)) < 0.5).double()
    alone = mean_interval(pictures.tolist())
    copied = mean_interval(pictures.repeat_interleave(10).tolist(), [i // 10 for i in range(1000)])
    blind = mean_interval(pictures.repeat_interleave(10).tolist())
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert blind.high - blind.low < 0.5 * (copied.high - copied.low)


def test_it_is_seeded():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
