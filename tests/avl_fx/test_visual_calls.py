"""Which positions are visual, as ranges that a graph takes: whatever the flags, they come back."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import avl_fx
from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from avl_fx.modality import attach, carried, given_rows
from avl_fx.partition import Partition, ranges_of
from avl_fx.passes.visual_inputs import _flags
from avl_fx.policies import VisionPolicy
from avl_fx.visual_calls import VisualCalls


@st.composite
def flags(draw, most=40):
    length = draw(st.integers(1, most))
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    return torch.tensor(draw(st.lists(rows, min_size=1, max_size=4)))


@settings(max_examples=200, deadline=None)
@given(visual=flags())
def test_flags_survive_as_ranges(visual):
    ranges = ranges_of(visual)
    assert ranges.shape == (len(visual), MAX_SEGMENTS, 2)
    like = torch.zeros(len(visual), 2, visual.shape[1], 3)
    assert torch.equal(_flags(ranges, like), visual)
    # Ranges name positions, so more of them are text.
    longer = _flags(ranges, torch.zeros(len(visual), 2, visual.shape[1] + 5, 3))
    assert torch.equal(longer[:, : visual.shape[1]], visual)
    assert not longer[:, visual.shape[1] :].any()


@settings(max_examples=50, deadline=None)
@given(visual=flags())
def test_a_partition_knows_its_visual_rows(visual):
    partition = Partition.start(VisionPolicy(core=1.0, secondary=1.0, refresh=0), visual)
    if not visual.any():
        assert partition is None
        return
    like = torch.zeros(len(visual), 1, visual.shape[1], 1)
    assert torch.equal(_flags(partition.visual_segments, like), visual)


def test_too_many_spans_are_not_cut_short():
    visual = torch.zeros(1, 4 * MAX_SEGMENTS, dtype=torch.bool)
    visual[:, : 2 * MAX_SEGMENTS : 2] = True
    assert ranges_of(visual) is not None
    visual[:, 2 * MAX_SEGMENTS] = True
    assert ranges_of(visual) is None
    partition = Partition.start(VisionPolicy(core=1.0, secondary=1.0, refresh=0), visual)
    assert partition.visual_segments is None


# ---- one call --------------------------------------------------------------------------------------------------------


def calls(**settings):
    values = {
        "batch": (0, 0),
        "queries": (0, 1),
        "takes_new": True,
        "takes_past": False,
        "starts": True,
        "shown": False,
    }
    return VisualCalls(**{**values, **settings}, device=torch.device("cpu"))


def named(served, hidden, tokens=None):
    (ranges,) = served.new([hidden], tokens, carried([hidden]))
    return _flags(ranges, torch.zeros(len(hidden), 1, hidden.shape[1], 1))


VISUAL = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0]]).bool()


def test_what_rides_on_the_hidden_states():
    hidden = torch.zeros(2, 6, 4)
    attach([hidden], VISUAL)
    assert torch.equal(named(calls(), hidden), VISUAL)


def test_what_the_user_gave():
    with avl_fx.modality_ids(VISUAL.long()):
        assert torch.equal(named(calls(), torch.zeros(2, 6, 4)), VISUAL)
        assert torch.equal(given_rows(6, 0), VISUAL)


def test_a_graph_that_shows_its_own_is_told_what_an_earlier_one_showed_alone():
    served, hidden = calls(shown=True), torch.zeros(2, 6, 4)
    with avl_fx.modality_ids(VISUAL.long()):
        assert not named(served, hidden).any()
        attach([hidden], VISUAL.flip(1))
        assert torch.equal(named(served, hidden), VISUAL.flip(1))
    assert served.sizes([hidden]) is None
    assert calls().sizes([hidden]) == (2, 6)


@pytest.mark.parametrize("pieces", [(6,), (2, 4), (3, 1, 2), (4, 4)])
def test_a_prompt_in_pieces(pieces):
    """Each piece has its own; what stands behind all of them is text."""
    seen, first = [], True
    with avl_fx.modality_ids(VISUAL):
        for piece in pieces:
            served, tokens = calls(starts=first), sum(x.shape[1] for x in seen)
            seen.append(named(served, torch.zeros(2, piece, 4), tokens))
            first = False
    got = torch.cat(seen, 1)
    assert torch.equal(got[:, :6], VISUAL)
    assert not got[:, 6:].any()


def test_unknown_is_text():
    assert not named(calls(), torch.zeros(2, 6, 4)).any()
    with avl_fx.modality_ids(VISUAL):
        # A static cache does not say how many tokens it holds.
        assert not named(calls(starts=False), torch.zeros(2, 4, 4), tokens=None).any()
    assert calls(takes_new=False).new([torch.zeros(2, 6, 4)], 0, None) == ()


def test_another_batch_is_said(caplog):
    with caplog.at_level(logging.WARNING, "avl_fx"), avl_fx.modality_ids(VISUAL):
        assert not named(calls(), torch.zeros(4, 6, 4)).any()
    assert "do not fit 4 rows of 6 tokens" in caplog.text


def test_a_cache_without_state_has_no_visual_rows():
    served = calls(takes_new=False, takes_past=True)
    (ranges,) = served.past([torch.zeros(3, 1, 4)], None)
    assert ranges.shape == (3, MAX_SEGMENTS, 2)
    assert not ranges.any()
