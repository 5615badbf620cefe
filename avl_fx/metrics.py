"""How good an answer is: a number from 0 to 1 for what was said and what should have been said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

__all__ = ["METRICS", "Metric", "anls", "clause_f1", "exact_match", "normalised", "rouge_l"]

Metric = Callable[[str, str], float]
"""``(said, reference) -> score``, 0 to 1, higher is better."""


def normalised(text: str) -> str:
    """Lower case, single spaces, no full stop at the end: what differs in nothing else is the same answer."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def exact_match(said: str, reference: str) -> float:
    """1 where both are the same after `normalised`, else 0."""
    return float(normalised(said) == normalised(reference))


def anls(said: str, reference: str) -> float:
    """Normalised Levenshtein similarity of one answer: ``1 - d / max(len)``, or 0 where that is below 0.5.

    Its average over answers is ANLS (Biten et al., Scene Text Visual Question Answering, arXiv 1905.13648, equation 1):
    a slip of the reader costs a little, another word costs all.
    """
    a, b = normalised(said), normalised(reference)
    if not a or not b:
        return float(a == b)
    similarity = 1 - _levenshtein(a, b) / max(len(a), len(b))
    return similarity if similarity >= 0.5 else 0.0


def rouge_l(said: str, reference: str) -> float:
    """ROUGE-L F1 over words (Lin, 2004): the longest common subsequence over both lengths."""
    a, b = normalised(said).split(), normalised(reference).split()
    if not a or not b:
        return float(a == b)
    return 2 * _common(a, b) / (len(a) + len(b))


def clause_f1(said: str, reference: str) -> float:
    """F1 of what is claimed: clauses, separated by ``;``, as a bag.

    For descriptions that list facts: a thing at the wrong place is as wrong as another thing.
    """
    a, b = _clauses(said), _clauses(reference)
    if not a or not b:
        return float(a == b)
    return 2 * sum((a & b).values()) / (sum(a.values()) + sum(b.values()))


METRICS: dict[str, Metric] = {"exact": exact_match, "anls": anls, "rouge_l": rouge_l, "clauses": clause_f1}
"""Every metric, by the name that `avl_fx.evaluate` takes."""


def _clauses(text: str) -> Counter[str]:
    return Counter(clause for part in text.split(";") if (clause := normalised(part)))


def _levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and replacements that make ``b`` of ``a``."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if left == right else max(row[j], row[j - 1])
    return row[-1]
