"""Metrics against values by hand and against their definitions."""

from difflib import SequenceMatcher
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_fx.metrics import METRICS, anls, clause_f1, exact_match, rouge_l

WORDS = st.lists(st.sampled_from("abc"), max_size=7).map(" ".join)


@pytest.mark.parametrize(
    ("said", "reference", "score"),
    [("Red.", "red", 1), ("  a  cat ", "A cat", 1), ("cat", "cats", 0), ("", "", 1), ("", "x", 0)],
)
def test_exact(said, reference, score):
    assert exact_match(said, reference) == score


@pytest.mark.parametrize(
    ("said", "reference", "score"),
    [("maple", "maple", 1), ("mapla", "maple", 0.8), ("ma", "maple", 0), ("map", "maples", 0.5), ("", "x", 0)],
)
def test_anls(said, reference, score):
    assert anls(said, reference) == pytest.approx(score)


@given(st.text("ab", max_size=7), st.text("ab", max_size=7))
def test_anls_is_the_edit_distance(a, b):
    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    longest = max(len(a), len(b))
    similarity = 1 - distance(len(a), len(b)) / longest if longest else 1.0
    expected = similarity if similarity >= 0.5 else 0.0
    assert anls(a, b) == pytest.approx(expected)


def test_rouge_l():
    assert rouge_l("the cat sat", "the cat lay down") == pytest.approx(2 * 2 / 7)
    assert rouge_l("b a", "a b") == pytest.approx(0.5)


@given(WORDS, WORDS)
def test_rouge_l_is_at_least_any_common_run(a, b):
    left, right = a.split(), b.split()
    if left and right:
        run = SequenceMatcher(None, left, right, autojunk=False).find_longest_match().size
        assert rouge_l(a, b) >= 2 * run / (len(left) + len(right)) - 1e-9


def test_clauses_are_a_bag():
    reference = "top left: cat; center: dog; bottom left: dog"
    assert clause_f1("center: dog; top left: cat; bottom left: dog", reference) == 1
    assert clause_f1("top left: dog; center: cat", reference) == 0
    assert clause_f1("top left: cat", reference) == pytest.approx(2 / 4)
    assert clause_f1("center: dog; center: dog; center: dog", reference) == pytest.approx(2 / 6)


@pytest.mark.parametrize("name", METRICS)
@given(a=WORDS, b=WORDS)
def test_every_metric_is_one_for_the_reference_and_symmetric(name, a, b):
    metric = METRICS[name]
    assert metric(a, a) == 1
    assert metric(a, b) == pytest.approx(metric(b, a))
    assert 0 <= metric(a, b) <= 1
