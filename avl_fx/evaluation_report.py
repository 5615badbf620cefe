"""What an evaluation found: scores with intervals, distance from the dense model, bytes; as table, JSON and picture."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avl_fx._bootstrap import Interval, mean_interval
from avl_fx._messages import quote
from avl_fx._planfile import reason
from avl_fx.errors import EvaluationError
from avl_fx.metrics import Metric, normalised

__all__ = ["DENSE", "ContenderResult", "EvaluationReport", "Row"]

DENSE = "dense"
"""Name of the model as it is, which every evaluation begins with."""


@dataclass(frozen=True)
class Row:
    """One answer."""

    said: str
    group: str
    score: float
    divergence: float
    agreement: float
    kv_bytes: float
    step_seconds: float | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any], metric: Metric) -> Row:
        """A record of the journal, judged."""
        score = metric(record["said"], record["reference"])
        kept = {name: record[name] for name in ("said", "group", "divergence", "agreement", "kv_bytes", "step_seconds")}
        return cls(score=score, **kept)


@dataclass(frozen=True)
class ContenderResult:
    """What one contender's answers are worth."""

    score: Interval
    """Average of the metric."""
    difference: Interval
    """To the dense score, question by question."""
    same_answers: float
    """Share of answers that are the dense ones."""
    agreement: float
    """Share of the dense answers' tokens that it would choose too, averaged over answers."""
    divergence: float
    """Nats a token of the dense answers, averaged over answers."""
    kv_bytes: float
    """Of the cache behind an answer, averaged."""
    kv_share: float
    """Of the dense model's; 0 where that keeps no cache."""
    budget: float | None
    """Share of the visual keys that it works with, where it is known."""
    step_seconds: float | None = None
    """Median decode step, of a batch; where answers have more than one token."""


@dataclass(frozen=True)
class EvaluationReport:
    """The result of `avl_fx.evaluate`; ``str(report)`` is a Markdown table."""

    name: str
    metric: str
    questions: int
    groups: int
    """Pictures, or whatever questions have in common."""
    results: Mapping[str, ContenderResult]
    """By contender, ``dense`` first."""

    @classmethod
    def of(
        cls,
        name: str,
        metric: str,
        rows: Mapping[str, Sequence[Row]],
        budgets: Mapping[str, float | None],
        seed: int = 0,
    ) -> EvaluationReport:
        """Sum up the answers of all contenders; ``rows[DENSE]`` are those of the model itself."""
        dense = rows[DENSE]
        groups = [row.group for row in dense]
        dense_bytes = _mean([row.kv_bytes for row in dense])
        results: dict[str, ContenderResult] = {}
        for contender, mine in rows.items():
            gained = [row.score - other.score for row, other in zip(mine, dense, strict=True)]
            held = _mean([row.kv_bytes for row in mine])
            results[contender] = ContenderResult(
                score=mean_interval([row.score for row in mine], groups, seed=seed),
                difference=mean_interval(gained, groups, seed=seed),
                same_answers=_mean(
                    [float(normalised(a.said) == normalised(b.said)) for a, b in zip(mine, dense, strict=True)]
                ),
                agreement=_mean([row.agreement for row in mine]),
                divergence=_mean([row.divergence for row in mine]),
                kv_bytes=held,
                kv_share=held / dense_bytes if dense_bytes else 0.0,
                budget=budgets.get(contender),
                step_seconds=_median([row.step_seconds for row in mine if row.step_seconds is not None]),
            )
        return cls(name, metric, len(dense), len(set(groups)), results)

    def __str__(self) -> str:
        return self.markdown()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def markdown(self) -> str:
        """A table in Markdown: one line a contender."""
        head = (
            "",
            self.metric,
            "95% interval",
            "to dense",
            "same answers",
            "tokens",
            "nats a token",
            "KV bytes",
            "ms a step",
        )
        lines = [
            f"{self.name}: {self.questions} questions in {self.groups} groups.",
            "",
            f"| {' | '.join(head)} |",
            f"|---|{'---:|' * (len(head) - 1)}",
        ]
        for name, found in self.results.items():
            score, gained = found.score, found.difference
            cells = (
                name,
                f"{score.mean:.1%}",
                f"{score.low:.1%} to {score.high:.1%}",
                ""
                if name == DENSE
                else f"{100 * gained.mean:+.1f} ({100 * gained.low:+.1f} to {100 * gained.high:+.1f})",
                f"{found.same_answers:.1%}",
                f"{found.agreement:.1%}",
                f"{found.divergence:.4f}",
                f"{found.kv_share:.0%}",
                "" if found.step_seconds is None else f"{1e3 * found.step_seconds:.1f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def dump(self, folder: str | os.PathLike[str]) -> None:
        """Write ``evaluation.json``, ``evaluation.md`` and, where matplotlib is installed, ``evaluation.png``.

        Raises:
            EvaluationError: the folder cannot be written to.
        """
        from avl_fx._evaluation_picture import picture

        path = Path(os.path.expanduser(folder))
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "evaluation.json").write_text(self.to_json(), encoding="utf-8")
            (path / "evaluation.md").write_text(self.markdown(), encoding="utf-8")
            image = picture(self)
            if image is not None:
                (path / "evaluation.png").write_bytes(image)
        except OSError as error:
            raise EvaluationError(
                f"cannot write to {quote(folder)}: {reason(error)}",
                field="output",
                remedy="name a folder that you may write to",
            ) from error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
