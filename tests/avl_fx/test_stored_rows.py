"""A packed cache against a complete one: the same tokens are read, and no row is kept that nobody reads."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from avl_fx.partition import Partition
from avl_fx.policies import TextPolicy, VisionPolicy
from avl_fx.stored_rows import StoredRows
from tests.avl_fx.test_text_window import Expected, weights_of

LAYER = 0


class Rows:
    """The token in each row of each batch row, by its position in the sequence; None where there is nothing."""

    def __init__(self, batch, length):
        self.lies = [list(range(length)) for _ in range(batch)]

    def move(self, moves):
        if moves is None:
            return
        source, slots = (x.expand(len(self.lies), -1, -1)[:, 0].tolist() for x in moves)
        for row, origins, targets in zip(self.lies, source, slots, strict=True):
            old = list(row)
            for origin, target in zip(origins, targets, strict=True):
                if target >= 0:
                    row[target] = old[origin]

    def pack(self, source):
        self.lies = [
            [None if origin < 0 else row[origin] for origin in origins]
            for row, origins in zip(self.lies, source.tolist(), strict=True)
        ]

    def append(self, token):
        for row in self.lies:
            row.append(token)

    def shorten(self, count):
        self.lies = [row[:count] for row in self.lies]

    def read(self, segments):
        found = []
        for row, ranges in zip(self.lies, segments.tolist(), strict=True):
            rows = [row[p] for start, length in ranges for p in range(start, min(start + length, len(row)))]
            found.append(rows)
        return found


def weights(by_token, rows):
    """What attention says of each row; nothing of those that hold nothing."""
    picked = [[0.0 if t is None else float(by_token[b, 0, t]) for t in row] for b, row in enumerate(rows.lies)]
    return torch.tensor(picked)[:, None].expand(-1, by_token.shape[1], -1).contiguous()


@st.composite
def prompts(draw):
    length = draw(st.integers(2, 16))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    visual = torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))
    padding = [draw(st.integers(0, length - 1)) for _ in range(len(visual))]
    visible = torch.arange(length) >= torch.tensor(padding)[:, None]
    return visual & visible, visible


@settings(max_examples=80, deadline=None)
@given(
    prompts(),
    st.sampled_from([(0.3, 0.5), (0.2, 1.0), (1.0, 1.0)]),
    st.one_of(
        st.none(),
        st.builds(
            TextPolicy,
            budget=st.sampled_from([0.2, 0.5, 0.9]),
            minimum=st.integers(0, 4),
            decay=st.sampled_from(["forgetting", "none"]),
        ),
    ),
    st.integers(0, 2**16),
    st.integers(0, 14),
)
def test_it_reads_what_the_method_says_and_stores_no_more(prompt, shares, text, seed, steps):
    visual, visible = prompt
    batch, length = visual.shape
    assume(bool(visual.any()))
    rows = Rows(batch, length)
    scores = weights_of(seed, batch, length, text)
    state = Partition.start(VisionPolicy(core=shares[0], secondary=shares[1], refresh=0), visual, text, visible)
    assert state is not None
    for moves in state.first_moves({LAYER: scores}):
        rows.move(moves.order(0))
    expected = None
    if text is not None:
        expected = [Expected(text, flags) for flags in visual.tolist()]
        for b, row in enumerate(expected):
            row.text = [p for p in row.text if visible[b, p]]
            row.scores, row.length = dict.fromkeys(row.text, 0.0), len(row.text)
            row.step(scores[b, 0].tolist())
        rows.move(state.text.forget(LAYER, weights(scores, rows), appended=False))
        state.text.settle(appended=False)
    kept = [secondary_of(visual[b], scores[b].mean(0), shares[1]) for b in range(batch)]
    state, source = state.pack(visible)
    rows.pack(source)
    for step in range(steps):
        token = length + step
        by_token = weights_of(seed + step + 1, batch, token + 1, text)[:, :1].expand(-1, 2, -1)
        rows.append(token)
        read = rows.read(state.segments)
        fed = list(range(length, token + 1))
        for b in range(batch):
            assert read[b][-1] == token, "the new one stands behind all others"
            assert sorted(read[b]) == sorted(wanted(b, visual, visible, kept, expected, fed)), (b, step)
        by_row = weights(by_token, rows)
        if text is None:
            state.stored.append()
            state.length += 1
        else:
            state.text.append(state.length, state.stored.length)
            state.length += 1
            rows.move(state.text.forget(LAYER, by_row, appended=True))
            state.text.settle(appended=True)
            for b, row in enumerate(expected):
                row.step(by_token[b].mean(0).tolist(), token)
            rows.move(state.close_ranks())
            rows.shorten(state.length)
        check_columns(state.stored, rows, visual, visible, text is not None)
        if text is not None:
            stays = [len(wanted(b, visual, visible, kept, expected, fed)) for b in range(batch)]
            # Of the newest token of a windowed row only what its window kept is stored.
            stays = [n - (expected[b].first is not None) for b, n in enumerate(stays)]
            assert state.length == max(stays), "the longest batch row decides"


def secondary_of(visual, score, share):
    positions = visual.nonzero().flatten()
    order = score[positions].sort(descending=True, stable=True).indices
    return positions[order[: int(share * len(positions))]].tolist()


def wanted(b, visual, visible, kept, expected, fed):
    """Tokens that batch row ``b`` reads, of a prompt and the tokens ``fed`` since."""
    whole = expected is None or expected[b].first is None
    first = visual.shape[1] if whole else expected[b].first
    text = [p for p in range(first) if visible[b, p] and not visual[b, p]]
    return text + kept[b] + (fed if whole else expected[b].text + fed[-1:])


def check_columns(stored, rows, visual, visible, windowed):
    """Each stored row obeys a column of the mask that is as visible as its own."""
    assert stored.count == len(rows.lies[0])
    for b, row in enumerate(rows.lies):
        # Behind the end of a windowed row lies what its window drove out: nobody reads it.
        count = stored.ends[b] if windowed else stored.count
        columns = stored.columns[b, :count].tolist()
        for token, column in zip(row[:count], columns, strict=True):
            if token is None:
                continue
            assert column >= 0, "what is there can be seen"
            fed = token >= visual.shape[1]
            if not windowed or not visual[b].any():
                both_visual = not fed and visual[b, token] and visual[b, column]
                assert column == token or both_visual, "its own, or that of another visual token"
            assert column >= visual.shape[1] or visible[b, column]


def test_nothing_is_packed_twice():
    whole = StoredRows.of_complete(6, [2, 3])
    keep = torch.tensor([[True, True, False, True, False, True], [True] * 6])
    packed, source, places = whole.pack(keep)
    assert source.tolist() == [[0, 1, 3, 5, -1, -1], [0, 1, 2, 3, 4, 5]]
    assert packed.columns.tolist() == source.tolist()
    assert packed.ends == [4, 6]
    assert places[0, keep[0]].tolist() == [0, 1, 2, 3]
    again, source, _ = packed.pack(torch.tensor([[True] * 4 + [False] * 2, [True] * 4 + [False] * 2]))
    assert again.count == again.packed == 4
    assert again.columns.tolist() == [[0, 1, 3, 5], [0, 1, 2, 3]]


def test_rows_that_came_since_can_be_taken_back():
    packed, _, _ = StoredRows.of_complete(4, [1]).pack(torch.tensor([[True, False, True, True]]))
    for _ in range(3):
        packed.append()
    assert packed.columns[:, : packed.count].tolist() == [[0, 2, 3, 4, 5, 6]]
    back = packed.cropped(2)
    assert (back.count, back.length) == (4, 5)
    back.append()
    assert back.columns[:, : back.count].tolist() == [[0, 2, 3, 4, 5]]


@pytest.mark.parametrize("steps", [1, 200])
def test_columns_have_room(steps):
    rows, _, _ = StoredRows.of_complete(3, [1, 1]).pack(torch.tensor([[True] * 3, [True, True, False]]))
    for _ in range(steps):
        rows.append()
    assert rows.columns[0, : rows.count].tolist() == list(range(3 + steps))
    assert rows.columns[1, : rows.count].tolist() == [0, 1, -1, *range(3, 3 + steps)]
