"""The state of a partitioned cache: what is read, how rows move, and when the state is no longer believed."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import avl_fx.partition
from avl_fx.kernels.partition import partition_, partition_layers_
from avl_fx.kernels.partitioned_decode.native import is_available
from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from avl_fx.partition import Partition, everything, find_partition
from avl_fx.policies import VisionPolicy

KV_HEADS, HEAD_DIM = 2, 4


@pytest.fixture(params=["native", "tensors", "together"], autouse=True, scope="module")
def selection(request):
    """Core is picked in C++ on a CPU with a compiler, by tensor operators without, for all layers at once elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tensors":
            patch.setattr(avl_fx.partition, "reselect_native", lambda *args: None)
        if request.param == "together":
            patch.setattr(avl_fx.partition, "one_by_one", lambda device: False)
        yield request.param


def read_positions(segments, keys):
    """Key positions that one row's segments cover."""
    return sorted(p for start, length in segments.tolist() for p in range(start, min(start + length, keys)))


def tagged(visual):
    """Keys whose content is their own position, so that a moved row is recognised."""
    batch, length = visual.shape
    positions = torch.arange(length, dtype=torch.float32)[None, None, :, None]
    heads = torch.arange(KV_HEADS, dtype=torch.float32)[None, :, None, None] * 1000
    return (positions + heads).expand(batch, KV_HEADS, length, HEAD_DIM).clone()


def move(keys, values, several):
    """Rows of the one layer that there is change places."""
    for moves in several:
        partition_(keys, values, *moves.order(0))


@st.composite
def rows(draw):
    """Visual positions of one to three ragged rows, some without any."""
    length = draw(st.integers(1, 24))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))


@st.composite
def policies(draw):
    secondary = draw(st.floats(0.1, 1.0))
    return VisionPolicy(
        core=draw(st.floats(0.05, secondary)),
        secondary=secondary,
        refresh=draw(st.integers(0, 4)),
        scores=draw(st.sampled_from(["shared", "per_kv_head"])),
        spread=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
    )


def scores_of(seed, batch, length):
    # Few different values: ties happen.
    return torch.randint(0, 6, (batch, KV_HEADS, length), generator=torch.Generator().manual_seed(seed)).float()


def best(scores, among, count):
    """The `count` best of the positions `among`, equal scores to the earlier one."""
    return set(sorted(among, key=lambda p: (-scores[p].item(), p))[:count])


def kept(scores, among, count, spread, group, layer=0):
    """The best of the positions `among`, and for the last `int(spread * count)` those that are spread evenly."""
    chosen = best(scores, among, count - int(spread * count))
    turn = {p: (i * 2654435769 + layer * 3242174889 + group * 2447445414) % 2**32 for i, p in enumerate(among, 1)}
    return chosen | set(sorted(set(among) - chosen, key=turn.get)[: count - len(chosen)])


@given(visual=rows(), policy=policies(), seed=st.integers(0, 2**16), steps=st.integers(0, 9))
@example(  # a row with fewer moves than another
    visual=torch.tensor([[False] * 5 + [True] * 2, [False] * 3 + [True] * 4]),
    policy=VisionPolicy(core=0.5, secondary=1.0),
    seed=0,
    steps=9,
)
@settings(max_examples=150, deadline=None)
def test_rows_move_as_the_scores_say_and_nothing_is_lost(visual, policy, seed, steps):
    batch, length = visual.shape
    partition = Partition.start(policy, visual)
    if partition is None:
        assert not visual.any()
        return
    keys, values = tagged(visual), tagged(visual) + 0.5
    before = keys.clone()
    scores = scores_of(seed, batch, length)
    move(keys, values, partition.first_moves({0: scores}))
    groups = range(1 if policy.scores == "shared" else KV_HEADS)

    def group_scores(scores, b, g):
        return scores[b].mean(0) if policy.scores == "shared" else scores[b, g]

    def positions(b, g, slots):
        return {int(p) % 1000 for p in keys[b, g, slots, 0].tolist()}

    slots = [flags.nonzero().flatten() for flags in visual]
    counts = [(int(policy.core * len(s)), int(policy.secondary * len(s))) for s in slots]
    secondary = {}
    for b in range(batch):
        for g in groups:
            ranked = group_scores(scores, b, g)
            secondary[b, g] = kept(ranked, slots[b].tolist(), counts[b][1], policy.spread, g)
            assert positions(b, g, slots[b][: counts[b][1]]) == secondary[b, g]
            assert positions(b, g, slots[b][: counts[b][0]]) == best(ranked, secondary[b, g], counts[b][0])
    for step in range(steps):
        # What a step reads by position is no longer what lies there: scores are asked of where tokens are now.
        where = keys[..., 0].long() % 1000
        scores = scores_of(seed + step + 1, batch, length)
        move(keys, values, partition.next_moves({0: scores.gather(2, where)}))
        for b in range(batch):
            for g in groups:
                wanted = best(group_scores(scores, b, g), secondary[b, g], counts[b][0])
                assert positions(b, g, slots[b][: counts[b][0]]) == wanted
                assert positions(b, g, slots[b][: counts[b][1]]) == secondary[b, g]
    assert torch.equal(values, keys + 0.5)
    assert torch.equal(keys.sort(2).values, before)
    text = ~visual[:, None].expand(-1, KV_HEADS, -1)
    assert torch.equal(keys[text], before[text])


@given(visual=rows(), policy=policies(), seed=st.integers(0, 2**16), steps=st.integers(0, 4))
@settings(max_examples=80, deadline=None)
def test_layers_that_are_served_at_once_choose_as_each_would_alone(visual, policy, seed, steps):
    alone, together = (Partition.start(policy, visual) for _ in range(2))
    if alone is None:
        return
    layers = (0, 2, 3)
    caches = {
        name: {layer: (tagged(visual), tagged(visual) + 0.5) for layer in layers} for name in ("alone", "together")
    }

    def step(choose, seed):
        where = {layer: keys[..., 0].long() % 1000 for layer, (keys, _) in caches["alone"].items()}
        scores = {layer: scores_of(seed + 100 * layer, *visual.shape).gather(2, where[layer]) for layer in layers}
        for layer in layers:
            move(*caches["alone"][layer], choose(alone, {layer: scores[layer]}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(avl_fx.partition, "one_by_one", lambda device: False)
            for moves in choose(together, scores):
                assert moves.layers == layers
                written = [(*caches["together"][layer], number) for number, layer in enumerate(moves.layers)]
                partition_layers_(written, moves.source, moves.slots)
        for layer in layers:
            assert torch.equal(alone.tokens[layer], together.tokens[layer])
            assert all(map(torch.equal, caches["alone"][layer], caches["together"][layer]))

    step(Partition.first_moves, seed)
    for number in range(steps):
        step(Partition.next_moves, seed + number + 1)
    # A later prompt of one more token, which is visual.
    longer = torch.nn.functional.pad(visual, (0, 1), value=True)
    alone, together = (Partition.start(policy, longer, before=state) for state in (alone, together))
    visual = longer
    caches = {name: {layer: (tagged(visual), tagged(visual) + 0.5) for layer in layers} for name in caches}
    step(Partition.first_moves, seed + steps + 1)


def test_layers_with_other_heads_are_served_apart(monkeypatch):
    monkeypatch.setattr(avl_fx.partition, "one_by_one", lambda device: False)
    partition = Partition.start(VisionPolicy(core=0.25, secondary=0.5), torch.ones(1, 8, dtype=torch.bool))
    scores = {layer: torch.rand(1, heads, 8) for layer, heads in enumerate((2, 4, 2))}
    assert [moves.layers for moves in partition.first_moves(scores)] == [(0, 2), (1,)]
    assert [moves.layers for moves in partition.next_moves(scores)] == [(0, 2), (1,)]


@pytest.mark.parametrize("groups", [1, KV_HEADS])
def test_a_refresh_serves_layers_at_once_up_to_a_bound(monkeypatch, selection, groups):
    policy = VisionPolicy(core=0.25, secondary=0.5, scores="shared" if groups == 1 else "per_kv_head")
    # Two of eight rows may enter core: four entries a layer and group. The last layer has other heads.
    heads = (KV_HEADS, KV_HEADS, KV_HEADS, 2 * KV_HEADS)
    first, then = ({n: torch.rand(1, count, 8) for n, count in enumerate(heads)} for _ in range(2))
    alone = []
    for layer in range(len(heads)):
        partition = Partition.start(policy, torch.ones(1, 8, dtype=torch.bool))
        list(partition.first_moves({layer: first[layer]}))
        list(partition.next_moves({layer: then[layer]}))
        alone.append(partition.tokens[layer])
    monkeypatch.setattr(avl_fx.partition, "MOST_ENTRIES", 2 * groups * 4 + 1)
    partition = Partition.start(policy, torch.ones(1, 8, dtype=torch.bool))
    list(partition.first_moves(first))
    before = {layer: tokens.clone() for layer, tokens in partition.tokens.items()}
    served = [moves.layers for moves in partition.next_moves(then)]
    assert all(torch.equal(partition.tokens[layer], tokens) for layer, tokens in enumerate(alone))
    if selection == "native" and is_available():
        changed = {n for n, tokens in before.items() if not torch.equal(tokens, partition.tokens[n])}
        assert changed <= {layer for layers in served for layer in layers}
        assert all(layers in ((0, 1), (2,), (3,)) for layers in served)


def test_nothing_is_asked_where_no_row_can_enter_core(monkeypatch):
    monkeypatch.setattr(avl_fx.partition, "one_by_one", lambda device: False)
    partition = Partition.start(VisionPolicy(core=0.5, secondary=0.5), torch.ones(1, 8, dtype=torch.bool))
    scores = {0: torch.rand(1, 2, 8)}
    assert len(list(partition.first_moves(scores))) == 1
    assert not list(partition.next_moves(scores))


@given(visual=rows(), policy=policies())
@settings(max_examples=60, deadline=None)
def test_segments_leave_out_exactly_the_visual_rows_beyond_core(visual, policy):
    partition = Partition.start(policy, visual)
    if partition is None:
        return
    keys = visual.shape[1] + 3
    for segments, ratio in ((partition.core_segments, policy.core), (partition.secondary_segments, policy.secondary)):
        assert segments.shape == (len(visual), MAX_SEGMENTS, 2)
        for row, flags in zip(segments, visual, strict=True):
            slots = flags.nonzero().flatten().tolist()
            left_out = slots[int(ratio * len(slots)) :]
            assert read_positions(row, keys) == [p for p in range(keys) if p not in left_out]


@given(visual=rows(), policy=policies(), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_dense_attention_over_a_partitioned_cache_is_unchanged(visual, policy, seed):
    partition = Partition.start(policy, visual)
    if partition is None:
        return
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (
        torch.randn(len(visual), KV_HEADS, n, HEAD_DIM, generator=generator, dtype=torch.float64)
        for n in (1, visual.shape[1], visual.shape[1])
    )
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(query, keys, values)
    move(keys, values, partition.first_moves({0: scores_of(seed, *visual.shape)}))
    torch.testing.assert_close(attention(query, keys, values), expected)


def test_steps_alternate_between_core_and_secondary():
    visual = torch.tensor([[False, True, True, True, True, False]])
    partition = Partition.start(VisionPolicy(core=0.25, secondary=0.5, refresh=3), visual)
    read = []
    for _ in range(6):
        read.append(len(read_positions(partition.segments[0], 6)))
        partition.step += 1
    assert read == [3, 3, 4, 3, 3, 4]
    always = Partition.start(VisionPolicy(core=0.25, secondary=0.5, refresh=0), visual)
    assert len(read_positions(always.segments[0], 6)) == 4
    assert not always.refreshes
    assert read_positions(everything(torch.zeros(1, 2, 6, 4))[0][0], 6) == list(range(6))


def test_too_many_spans_stay_dense(caplog):
    visual = torch.tensor([[False, True] * (2 * MAX_SEGMENTS)])
    assert Partition.start(VisionPolicy(core=0.1), visual) is None
    assert "attention stays dense" in caplog.text


# ---- when the state is believed --------------------------------------------------------------------------------------


@pytest.fixture
def partitioned():
    policy = VisionPolicy()
    keys = [torch.zeros(1, KV_HEADS, 6, HEAD_DIM) for _ in range(3)]
    partition = Partition.start(policy, torch.tensor([[False, True, True, True, True, False]]))
    partition.attach(keys)
    return policy, keys, partition


def test_the_state_rides_on_the_keys(partitioned):
    policy, keys, partition = partitioned
    assert find_partition(keys, policy) is partition
    assert find_partition(keys, VisionPolicy(core=0.2)) is None  # another plan's


def test_keys_that_somebody_wrote_have_no_state(partitioned):
    policy, keys, _ = partitioned
    keys[1].zero_()  # what a reset of a static cache does
    assert find_partition(keys, policy) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda k: k[..., :-1, :],
        lambda k: k.index_select(0, torch.tensor([0])),
        lambda k: k.repeat_interleave(2, 0),
        lambda k: k[torch.tensor([0])],
        lambda k: k.clone(),
        copy.deepcopy,
    ],
    ids=["crop", "reorder", "repeat", "select", "clone", "deepcopy"],
)
def test_copies_have_no_state_of_their_own(partitioned, change):
    policy, keys, partition = partitioned
    changed = [change(k) for k in keys]
    found = find_partition(changed, policy)
    assert found is None or found is not partition
    assert find_partition([*keys[:2], changed[2]], policy) is None


def test_older_keys_of_the_same_cache_are_out_of_date(partitioned):
    policy, keys, partition = partitioned
    newer = [k.clone() for k in keys]
    partition.generation += 1
    partition.attach(newer)
    assert find_partition(newer, policy) is partition
    assert find_partition(keys, policy) is None


def test_a_layer_without_state_makes_the_whole_cache_unknown(partitioned):
    policy, keys, _ = partitioned
    assert find_partition([*keys, torch.zeros(1, KV_HEADS, 6, HEAD_DIM)], policy) is None
