"""The picture of an evaluation: score against budget, one series a way of answering."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avl_fx.evaluation_report import ContenderResult, EvaluationReport

__all__ = ["picture", "series"]

SHARE_AT_THE_END = re.compile(r"\s*\d+(\.\d+)?\s*%$")
COLOURS = 20


def series(names: Iterable[str]) -> dict[str, list[str]]:
    """Contenders that differ in a share at the end of their names are one series: ``random 50%``, ``random 10%``."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(SHARE_AT_THE_END.sub("", name) or name, []).append(name)
    return found


def picture(report: EvaluationReport) -> bytes | None:
    """A PNG; ``None`` where matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    ways = series(name for name in report.results if name != "dense")
    figure = Figure(figsize=(9, max(4.2, 0.21 * (len(ways) + 1))), layout="constrained")
    axis = figure.add_subplot()
    dense = report.results["dense"].score
    axis.axhspan(dense.low, dense.high, color="#92a8c4", alpha=0.3, lw=0)
    axis.axhline(dense.mean, color="#4a6a94", lw=1, label="dense")
    colours = matplotlib.colormaps["tab20"]
    for number, (way, names) in enumerate(ways.items()):
        colour = colours(number % COLOURS)
        edge = colour if number < COLOURS else "black"  # colours come a second time
        _draw(axis, way, [report.results[name] for name in names], colour, edge)
    axis.set(
        xlabel="share of visual keys (circles) or of KV bytes (squares)",
        ylabel=f"{report.metric}, mean and 95% interval",
        title=f"{report.name}: {report.questions} questions",
        xlim=(0, 1.05),
    )
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=130, metadata={"Software": None})
    return written.getvalue()


def _draw(axis: Any, way: str, results: list[ContenderResult], colour: Any, edge: Any) -> None:
    """Points of one series, joined in the order of their shares."""
    shares = [found.kv_share if found.budget is None else found.budget for found in results]
    order = sorted(range(len(results)), key=shares.__getitem__)
    scores = [results[place].score for place in order]
    means = [score.mean for score in scores]
    spread = [
        [mean - score.low for mean, score in zip(means, scores, strict=True)],
        [score.high - mean for mean, score in zip(means, scores, strict=True)],
    ]
    known = results[0].budget is not None
    at = [shares[place] for place in order]
    marker = {"marker": "o" if known else "s", "markeredgecolor": edge}
    axis.errorbar(at, means, yerr=spread, lw=1, capsize=2, label=way, color=colour, **marker)
