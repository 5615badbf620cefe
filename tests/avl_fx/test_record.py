"""A recorder notes the visual positions of each forward once, however many of its graphs know them."""

import torch

from avl_fx.record import Recorder

FIRST, SECOND, BOTH, GIVEN, OTHER = (torch.zeros(1, 4, dtype=torch.bool) for _ in range(5))


def seen(*calls):
    recorder = Recorder()
    for call in calls:
        recorder.saw_visual(*call)
    return recorder.visual


def same(left, right):
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def test_graphs_of_one_forward():
    assert same(seen((FIRST,), (FIRST, FIRST, None)), [FIRST])
    assert same(seen((FIRST, None), (BOTH, FIRST), (BOTH, BOTH)), [BOTH])


def test_two_forwards():
    assert same(seen((FIRST,), (SECOND,), (BOTH, SECOND), (OTHER,)), [FIRST, BOTH, OTHER])


def test_what_is_shown_stands_for_what_is_given():
    """Whichever graph runs first."""
    assert same(seen((FIRST, None, GIVEN), (GIVEN, None, GIVEN)), [FIRST])
    assert same(seen((GIVEN, None, GIVEN), (FIRST, None, GIVEN)), [FIRST])
    assert same(seen((FIRST, None, GIVEN), (GIVEN, None, GIVEN), (SECOND, None, GIVEN)), [FIRST, SECOND])
