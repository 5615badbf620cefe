"""Covering sets: few cases in which every pair (or triple ...) of values of different factors meets."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any


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


def one_each(cases: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """One case for each value of the first factor, spread so that the values of the others meet as often as can be."""
    seen: set[tuple[tuple[int, Any], ...]] = set()
    chosen = []
    for first in dict.fromkeys(case[0] for case in cases):
        best = max((c for c in cases if c[0] == first), key=lambda c: [len(_meetings(c[1:], n) - seen) for n in (2, 3)])
        chosen.append(best)
        seen |= _meetings(best[1:], 2) | _meetings(best[1:], 3)
    return chosen


def _meetings(case: tuple[Any, ...], strength: int) -> set[tuple[tuple[int, Any], ...]]:
    return set(itertools.combinations(enumerate(case), strength))
