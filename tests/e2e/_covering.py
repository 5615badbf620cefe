"""Covering sets: few cases in which every pair (or triple ...) of values of different factors meets."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def covering(
    factors: Sequence[Sequence[Any]], allowed: Callable[[tuple[Any, ...]], bool], strength: int = 2
) -> list[tuple[Any, ...]]:
    """A greedy choice among all allowed combinations of ``factors``; deterministic.

    Every ``strength`` values that occur together in some allowed combination occur together in a chosen one.
    """
    cases = {case: _meetings(case, strength) for case in itertools.product(*factors) if allowed(case)}
    missing = set().union(*cases.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(cases[case] & missing))
        chosen.append(best)
        missing -= cases[best]
    return chosen


def one_each(cases: Sequence[tuple[Any, ...]], by: Sequence[int] = (0,)) -> list[tuple[Any, ...]]:
    """One case for each value of the factors at the places ``by``.

    The values of the others are spread: they meet as often as can be, and none is much more frequent than another.
    """

    def others(case: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value for place, value in enumerate(case) if place not in by)

    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for case in cases:
        groups.setdefault(tuple(case[place] for place in by), []).append(case)
    seen: set[tuple[tuple[int, Any], ...]] = set()
    used: Counter[tuple[int, Any]] = Counter()

    def worth(case: tuple[Any, ...]) -> tuple[int, ...]:
        rest = others(case)
        return (*(len(_meetings(rest, n) - seen) for n in (2, 3)), -sum(used[at] for at in enumerate(rest)))

    chosen = []
    for group in groups.values():
        best = max(group, key=worth)
        chosen.append(best)
        seen.update(_meetings(others(best), 2) | _meetings(others(best), 3))
        used.update(enumerate(others(best)))
    return chosen


def rest_in_matrix(cases: Sequence[Any], kept: Sequence[Any], apart: bool = False) -> list[Any]:
    """``cases`` for `parametrize`: ``kept`` run in `make test`, the others in `make test-matrix`.

    ``apart``: each is a tuple of several arguments.
    """
    missing = [case for case in kept if case not in cases]
    if missing:
        raise ValueError(f"not among the cases: {missing}")
    marks = [() if case in kept else pytest.mark.matrix for case in cases]
    given = [case if apart else (case,) for case in cases]
    return [pytest.param(*arguments, marks=mark) for arguments, mark in zip(given, marks, strict=True)]


def _meetings(case: tuple[Any, ...], strength: int) -> set[tuple[tuple[int, Any], ...]]:
    return set(itertools.combinations(enumerate(case), strength))
