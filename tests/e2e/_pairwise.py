"""Pairwise covering: few cases in which every pair of values of two factors meets."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any


def pairwise(factors: Sequence[Sequence[Any]], allowed: Callable[[tuple[Any, ...]], bool]) -> list[tuple[Any, ...]]:
    """A greedy choice among all allowed combinations of ``factors``; deterministic.

    Every pair that occurs in some allowed combination occurs in a chosen one.
    """
    cases = [case for case in itertools.product(*factors) if allowed(case)]
    open_pairs = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while open_pairs:
        best = max(cases, key=lambda case: len(_pairs(case) & open_pairs))
        chosen.append(best)
        open_pairs -= _pairs(best)
    return chosen


def _pairs(case: tuple[Any, ...]) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    return set(itertools.combinations(enumerate(case), 2))
