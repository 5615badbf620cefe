"""`avl::survivors`: what stays is what the definition says, and every implementation says the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx.kernels.survivors import IMPLEMENTATIONS, survivors, survivors_reference

LOWEST = torch.finfo(torch.float32).min
MAY, MAY_NOT = (torch.tensor([flag], dtype=torch.int32) for flag in (1, 0))


@st.composite
def prompts(draw):
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 12))
    numbers = st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens)  # with ties
    scores = torch.tensor([[draw(numbers) for _ in range(heads)] for _ in range(batch)], dtype=torch.float32)
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    visual = torch.tensor([draw(flags) for _ in range(batch)])
    mask = None
    if draw(st.booleans()):
        mask = torch.tensor([[draw(flags)] for _ in range(draw(st.sampled_from([1, batch])))])
        mask = mask | visual.any(0) if draw(st.booleans()) else mask
        if draw(st.booleans()):
            bias = draw(st.sampled_from([0.0, 0.0, 0.5]))
            mask = torch.full(mask.shape, bias).masked_fill(~mask, LOWEST)
    keep, tail = draw(st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0])), draw(st.integers(0, min(3, tokens)))
    return scores, visual, mask, draw(st.sampled_from([MAY, MAY, MAY_NOT])), keep, tail


@settings(max_examples=200, deadline=None)
@given(prompts())
def test_implementations_agree_with_the_reference(prompt):
    for mine, theirs in zip(survivors_reference(*prompt), IMPLEMENTATIONS["cpu"](*prompt), strict=True):
        assert torch.equal(mine, theirs)


@settings(max_examples=100, deadline=None)
@given(prompts())
def test_what_stays(prompt):
    """Positions in order; all text, the tail and the `int(keep * N)` best visual ones; the rest as often as needed."""
    scores, visual, mask, may, keep, tail = prompt
    rows, valid = survivors(*prompt)
    tokens = visual.shape[1]
    assert (rows.diff(dim=1) > 0).all()
    lost = []
    for row in range(len(visual)):
        kept = set(rows[row, valid[row]].tolist())
        images = visual[row].nonzero().flatten().tolist()
        gone = sorted(set(range(tokens)) - kept)
        lost.append(len(gone))
        assert set(gone) <= {j for j in images if j < tokens - tail}
        if mask is None and int(may):
            wanted = len(images) - int(keep * len(images))
            assert len(gone) == min(wanted, sum(j < tokens - tail for j in images))
            mean = scores[row].mean(0)
            stay = [j for j in images if j in kept and j < tokens - tail]
            assert not gone or not stay or max(mean[gone]) <= min(mean[stay])
    assert rows.shape[1] == tokens - min(lost)


def test_by_hand():
    scores = torch.tensor([[[0.0, 5.0, 1.0, 2.0, 1.0, 9.0, 0.0]], [[0.0, 1.0, 2.0, 9.0, 9.0, 9.0, 0.0]]])
    visual = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0]]).bool()
    rows, valid = survivors(scores, visual, None, MAY, 0.5, 1)
    # Row 0 loses 2 and 4: of equal scores the later one goes first. Row 1 loses 1. One filler: the first lost token.
    assert rows.tolist() == [[0, 1, 2, 3, 5, 6], [0, 2, 3, 4, 5, 6]]
    assert valid.tolist() == [[True, True, False, True, True, True], [True] * 6]


@pytest.mark.parametrize("hidden", [False, True], ids=["a bias", "a hidden key"])
def test_nothing_goes_where_the_mask_depends_on_the_order_of_keys(hidden):
    scores, visual = torch.rand(1, 1, 6), torch.tensor([[0, 1, 1, 1, 1, 0]]).bool()
    mask = torch.zeros(1, 1, 6)
    mask[..., 2 if hidden else 0] = LOWEST if hidden else -0.5
    assert survivors(scores, visual, mask, MAY, 0.5, 1)[0].shape == (1, 6)
    mask[:] = 0.0
    assert survivors(scores, visual, mask, MAY, 0.5, 1)[0].shape == (1, 4)


def test_opcheck():
    arguments = torch.rand(2, 2, 8), torch.rand(2, 8) > 0.4, None, MAY, 0.5, 1
    torch.library.opcheck(torch.ops.avl.survivors.default, arguments)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("visual", {1: torch.zeros(2, 8)}),
        ("scores", {0: torch.rand(2, 1, 7)}),
        ("scores", {0: torch.rand(2, 1, 8).double()}),
        ("last_mask", {2: torch.ones(3, 1, 8).bool()}),
        ("last_mask", {2: torch.ones(2, 1, 9).bool()}),
        ("may_drop", {3: torch.ones(1)}),
        ("keep", {4: 0.0}),
        ("keep", {4: 1.5}),
        ("tail", {5: -1}),
        ("tail", {5: 9}),
    ],
)
def test_wrong_arguments(name, wrong):
    arguments = [torch.rand(2, 1, 8), torch.ones(2, 8).bool(), None, MAY, 0.5, 1]
    for position, value in wrong.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=f"^{name}: "):
        survivors(*arguments)
