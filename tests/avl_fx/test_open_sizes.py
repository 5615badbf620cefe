"""Which sizes of what a decoder is given `avl_fx.compile` leaves open: its batch and its length, however they lie."""

from __future__ import annotations

import pytest
import torch

from avl_fx._compat import _batch_and_sequence

BATCH, LENGTH, HIDDEN = 3, 7, 8


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((BATCH, LENGTH), torch.int64, (0, [1])),
        ((LENGTH,), torch.int64, (0, [0])),
        ((3, BATCH, LENGTH), torch.int64, (1, [2])),
        ((3, BATCH, LENGTH), torch.float32, (1, [2])),
        ((BATCH, LENGTH, HIDDEN), torch.float32, (0, [1])),
        ((BATCH, LENGTH, LENGTH), torch.float32, (0, [1])),
        ((BATCH, LENGTH, 1), torch.bool, (0, [1])),
        ((BATCH, LENGTH, LENGTH), torch.bool, (0, [1, 2])),
        ((BATCH, 1, LENGTH, LENGTH), torch.bool, (0, [2, 3])),
        ((BATCH, 1, LENGTH, LENGTH), torch.float32, (0, [2, 3])),
        ((5, HIDDEN, LENGTH), torch.float32, (0, [])),
        ((5, LENGTH), torch.float32, (0, [])),
    ],
    ids=str,
)
def test_batch_and_sequence_are_found(shape, dtype, expected):
    assert _batch_and_sequence(torch.zeros(shape, dtype=dtype), BATCH, LENGTH) == expected
