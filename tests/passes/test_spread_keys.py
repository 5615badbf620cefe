"""Keys that a compact cache leaves out of lazy layers: prompts see all rows, and what is not there is the anchor's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import avl_fx
from avl_fx import AVLCache, Plan
from avl_fx.compact_calls import CompactCalls
from avl_fx.errors import CacheStateError
from avl_fx.partition import Partition
from avl_fx.partition_runtime import EVERYTHING
from avl_fx.passes.context import CompactRows, StoredTensor
from avl_fx.passes.site import Reason, Site
from avl_fx.passes.spread_keys import _spread
from avl_fx.stored_rows import StoredRows
from tests.e2e._doors import decoder_graphs, decoder_sites, through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

KV_HEADS, DIM, STEPS = 2, 4, 3


@st.composite
def visuals(draw):
    """Visual positions of one to three ragged rows, at least one in each."""
    length = draw(st.integers(2, 20))
    row = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))


def packed(visual):
    """The state of a compact cache that keeps every row, without the keys that lazy layers can do without."""
    state = Partition.start(EVERYTHING, visual)
    state.stored = StoredRows.of_complete(visual.shape[1], visual.sum(1).tolist())
    state.leave_out_keys()
    return state


def row_numbers(visual):
    """Rows that carry their own number: float ``[B, KV_HEADS, keys, DIM]``."""
    batch, length = visual.shape
    return torch.arange(length, dtype=torch.float32)[None, None, :, None].expand(batch, KV_HEADS, -1, DIM).clone()


@settings(max_examples=60, deadline=None)
@given(visuals())
def test_what_is_left_out_is_visual_and_as_much_in_every_batch_row(visual):
    state = packed(visual)
    fewest, length = int(visual.sum(1).min()), visual.shape[1]
    assert state.stored.keyless == min(fewest, length - 1)
    for flags, owned in zip(visual, state.owned_rows, strict=True):
        missing = sorted(set(range(length)) - set(owned.tolist()))
        assert missing == flags.nonzero().flatten().tolist()[: state.stored.keyless]
        assert owned.tolist() == sorted(owned.tolist())


@settings(max_examples=60, deadline=None)
@given(visuals(), st.booleans())
def test_text_is_the_layers_own_and_the_rest_is_its_anchors(visual, anchored):
    state, whole = packed(visual), row_numbers(visual)
    own = torch.stack([keys[:, rows] for keys, rows in zip(whole, state.owned_rows, strict=True)])
    theirs = whole + 100
    got = _spread(state.key_rows, own, theirs if anchored else None)
    at = visual[:, None, :, None]
    expected = torch.where(at, theirs, whole) if anchored else whole.masked_fill(at, 0)
    assert torch.equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(visuals(), st.randoms(use_true_random=False))
def test_text_that_changes_places_does_so_in_keys_that_lack_rows(visual, random):
    """As in the whole keys, of which the visual ones are then taken away."""
    state, length = packed(visual), visual.shape[1]
    text = [row.nonzero().flatten().tolist() for row in ~visual]
    width = max(map(len, text))
    if width == 0:
        return
    source, slots = torch.zeros(2, len(visual), 1, width, dtype=torch.int64)
    slots[:] = -1
    for row, positions in enumerate(text):
        slots[row, 0, : len(positions)] = torch.tensor(positions)
        source[row, 0, : len(positions)] = torch.tensor(random.sample(positions, len(positions)))
    whole = row_numbers(visual)
    expected = whole.clone()
    avl_fx.kernels.partition.partition_(expected, None, source, slots)

    def owned(keys):
        return torch.stack([k[:, rows] for k, rows in zip(keys, state.owned_rows, strict=True)])

    moved = owned(whole)
    avl_fx.kernels.partition.partition_(moved, None, *state.moved_keys((source, slots)))
    assert torch.equal(moved, owned(expected))
    assert length == whole.shape[2]


def test_nothing_is_left_out_where_no_step_could_be_told():
    """65 spans of visual rows: one more than a graph takes."""
    visual = (torch.arange(130) % 2 == 0)[None]
    state = packed(visual[:, :127])
    assert state.stored.keyless == 64
    object.__setattr__(state, "visual_segments", None)
    state.leave_out_keys()
    assert state.stored.keyless == 0


# ---- in a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return ZOO["llava"].make()


@pytest.mark.parametrize("mode", ["vla", pytest.param("vla_scores", marks=pytest.mark.matrix)])
def test_only_a_later_prompt_spreads(model, mode):
    plan = Plan.lazy([(1, 3)], mode)
    inputs, cache = ZOO["llava"].inputs(model, batch=1), AVLCache(plan, model.config)
    with through("avl_fx.compile", model, compiler="eager", plan=plan) as recorder, torch.no_grad():
        prefill_and_decode(model, inputs, cache, steps=STEPS)
        count = len(decoder_graphs(recorder))
        model(input_ids=torch.randint(10, 90, (1, 4)), past_key_values=cache)
    spread = [{p.name: p.count for p in graph.passes}["spread_keys"] for graph in decoder_graphs(recorder)]
    assert spread[:count] == [0] * count
    assert spread[-1] == 2
    assert all(s.reason is None for g in decoder_graphs(recorder) for s in decoder_sites(g))


@pytest.mark.parametrize("mode", [pytest.param("vla", marks=pytest.mark.matrix), "vla_scores"])
def test_eagerly_it_is_refused_and_left_as_it_was(model, mode):
    plan = Plan.lazy([(1, 3)], mode)
    inputs, cache = ZOO["llava"].inputs(model, batch=1), AVLCache(plan, model.config)
    with through("avl_fx.compile", model, compiler="eager", plan=plan):
        prefill_and_decode(model, inputs, cache, steps=STEPS)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    with pytest.raises(CacheStateError, match="runs eagerly"), torch.no_grad():
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_a_graph_that_reads_all_keys_refuses_fewer():
    """Its site was refused: what it would read is not there."""
    state = packed(torch.tensor([[True, True, False, False]]))
    calls = CompactCalls((StoredTensor(0, 1, True, complete=False),), False, False, frozenset())
    short, whole = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 4, 4)
    assert calls.inputs([whole, 4], state) == ()
    with pytest.raises(CacheStateError, match="holds 2 rows, and a graph asks for 4"):
        calls.inputs([short, 4], state)
    site = Site(index=0, style="sdpa", node=None)
    rows = CompactRows(stored=list(calls.stored), short={0: site})
    able = CompactCalls.of(rows)
    assert able.inputs([short, 4], state) == ()
    with pytest.raises(CacheStateError, match="holds 2 rows of 4 tokens"):
        able.inputs([short, 4], None)
    site.refuse(Reason.VISUAL_UNKNOWN)
    with pytest.raises(CacheStateError, match="holds 2 rows, and a graph asks for 4"):
        CompactCalls.of(rows).inputs([short, 4], state)
