"""The text window: what stays, what leaves, and that nothing is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx.kernels.partition import native
from avl_fx.policies import TextPolicy
from avl_fx.text_window import TextWindow
from tests._compiler import skip_without_compiler

KV_HEADS = 2


@pytest.fixture(params=["native", "python"], autouse=True, scope="module")
def implementation(request):
    if request.param == "native":
        skip_without_compiler()
        assert native._forget() is not None
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setattr(native, "_forget", lambda: None)
        yield


def weights_of(seed, batch, keys, policy):
    """Few different values, so that ties happen, where sums of them are exact; else a rounding could break a tie."""
    generator = torch.Generator().manual_seed(seed)
    if policy is None or policy.decay == "none" or policy.budget == 0.5:
        return torch.randint(0, 8, (batch, KV_HEADS, keys), generator=generator).float() / 8
    return torch.rand(batch, KV_HEADS, keys, generator=generator)


class Expected:
    """One batch row, by the letter: a dictionary of scores."""

    def __init__(self, policy, visual):
        self.policy, self.first = policy, visual.index(True) if True in visual else None
        self.text = [] if self.first is None else [p for p in range(self.first, len(visual)) if not visual[p]]
        self.scores, self.length = dict.fromkeys(self.text, 0.0), len(self.text)

    def step(self, row, position=None):
        """`row`: weight by position."""
        if position is not None and self.first is not None:
            self.text.append(position)
            self.scores[position] = 0.0
            self.length += 1
        if self.text:
            weight = torch.tensor([row[p] for p in self.text])
            forget = self.policy.decay == "forgetting"
            threshold = weight.quantile(1 - self.policy.budget) if forget else torch.tensor(0.0)
            for p, w in zip(self.text, weight, strict=True):
                self.scores[p] = float(torch.tensor(self.scores[p]) + (w - threshold))
        budget = max(round(self.policy.budget * self.length), self.policy.minimum)
        if len(self.text) > budget:
            recent = self.text[len(self.text) - budget // 2 :]
            rest = self.text[: len(self.text) - budget // 2]
            heavy = sorted(rest, key=lambda p: (-self.scores[p], p))[: budget - budget // 2]
            self.text = sorted(heavy + recent)


@st.composite
def prompts(draw):
    length = draw(st.integers(1, 20))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))


@settings(max_examples=60, deadline=None)
@given(
    prompts(),
    st.builds(
        TextPolicy,
        budget=st.sampled_from([0.2, 0.5, 0.6, 0.9]),
        minimum=st.integers(0, 6),
        decay=st.sampled_from(["forgetting", "none"]),
    ),
    st.integers(0, 2**16),
    st.integers(0, 12),
)
def test_what_stays_is_what_the_method_says(visual, policy, seed, steps):
    batch, length = visual.shape
    window = TextWindow.start(policy, visual, None)
    rows = [Expected(policy, flags) for flags in visual.tolist()]
    # Where each token lies, by its position at entry: moved by the swaps that the window asks for.
    lies = [list(range(length)) for _ in range(batch)]
    for step in range(steps + 1):
        position = length + step - 1
        if step:
            window.append(position)
            for row in lies:
                row.append(position)
        keys = length + step
        by_token = weights_of(seed + step, batch, keys, policy)
        by_row = torch.stack([by_token[b][:, lies[b]] for b in range(batch)])
        moves = window.forget(0, by_row, appended=step > 0)
        window.settle(appended=step > 0)
        if moves is not None:
            source, slots = moves
            assert source.shape == slots.shape == (batch, 1, source.shape[2])
            for b in range(batch):
                old = list(lies[b])
                for origin, slot in zip(source[b, 0].tolist(), slots[b, 0].tolist(), strict=True):
                    if slot >= 0:
                        lies[b][slot] = old[origin]
        for b, expected in enumerate(rows):
            assert sorted(lies[b]) == list(range(keys)), "nothing is lost"
            assert not any(visual[b, p] and lies[b][p] != p for p in range(length)), "visual rows stay"
            expected.step(by_token[b].mean(0).tolist(), position if step else None)
            if expected.first is None:
                assert window.cut(b) is None
                continue
            cut = keys if window.cut(b) is None else window.cut(b)
            text = [lies[b][p] for p in range(expected.first, cut) if p >= length or not visual[b, p]]
            assert sorted(text) == expected.text


def test_padding_is_no_text():
    visual = torch.tensor([[False, True, True, False, False, False]])
    visible = torch.tensor([[True, True, True, True, True, False]])
    window = TextWindow.start(TextPolicy(budget=0.5, minimum=0), visual, visible)
    assert window.counts == [2]
    assert window.slots[0, :2].tolist() == [3, 4]


def test_slots_grow_with_the_answer():
    window = TextWindow.start(TextPolicy(budget=0.5, minimum=2), torch.tensor([[True, False]]), None)
    window.forget(0, torch.rand(1, KV_HEADS, 2), appended=False)
    window.settle(appended=False)
    for position in range(2, 400):
        window.append(position)
        window.forget(0, torch.rand(1, KV_HEADS, position + 1), appended=True)
        window.settle(appended=True)
    assert window.counts == [399]
    assert window.kept == [200]
    assert sorted(window.tokens[0][0, :399].tolist()) == list(range(1, 400))


def test_tokens_keep_their_age_over_a_second_prompt():
    policy = TextPolicy(budget=0.5, minimum=2)
    visual = torch.tensor([[True] + [False] * 8])
    window = TextWindow.start(policy, visual, None)
    # The last tokens weigh most: they move to the front.
    window.forget(0, torch.arange(9.0).expand(1, KV_HEADS, 9).contiguous(), appended=False)
    window.settle(appended=False)
    assert sorted(window.tokens[0][0, :4].tolist()) == [5, 6, 7, 8]
    longer = torch.tensor([[True] + [False] * 8 + [True, False]])
    second = TextWindow.start(policy, longer, None, before=window)
    assert second.slots[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert second.tokens[0][0, :8].tolist() == window.tokens[0][0, :8].tolist()
    assert second.tokens[0][0, 8] == 10
