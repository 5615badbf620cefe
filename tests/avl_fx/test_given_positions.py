"""Which keys the positions that a user gives belong to."""

import pytest
import torch

import avl_fx
from avl_fx.modality import given_keys

POSITIONS = torch.tensor([[0, 1, 1, 0]])


def test_nothing_is_given():
    assert given_keys(queries=4, keys=4) is None


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([(4, 4), (0, 5), (3, 8)], [0, 0, 0]),  # a prompt, a step, a verification of three candidates
        ([(2, 2), (2, 4), (0, 5)], [None, 0, 0]),  # a prompt in pieces
        ([(0, 9)], [0]),  # a late start
        ([(4, 13), (0, 14)], [9, 9]),  # a second turn
        ([(4, 4), (4, 9)], [0, 0]),  # a verification as long as the prompt
    ],
)
def test_they_are_those_of_the_forward_they_fit_or_of_the_first_keys(calls, expected):
    with avl_fx.modality_ids(POSITIONS):
        assert [given_keys(queries, keys) for queries, keys in calls] == expected


def test_a_new_block_begins_anew():
    with avl_fx.modality_ids(POSITIONS):
        assert given_keys(4, 13) == 9
    with avl_fx.modality_ids(POSITIONS):
        assert given_keys(4, 4) == 0
