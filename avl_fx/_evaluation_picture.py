"""The picture of an evaluation: score against budget, one point a contender."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avl_fx.evaluation_report import EvaluationReport

__all__ = ["picture"]


def picture(report: EvaluationReport) -> bytes | None:
    """A PNG; ``None`` where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.add_subplot()
    dense = report.results["dense"].score
    axis.axhspan(dense.low, dense.high, color="#92a8c4", alpha=0.3, lw=0)
    axis.axhline(dense.mean, color="#4a6a94", lw=1, label="dense")
    for number, (name, found) in enumerate(report.results.items()):
        if name == "dense":
            continue
        score = found.score
        at = found.kv_share if found.budget is None else found.budget
        spread = [[score.mean - score.low], [score.high - score.mean]]
        marker = "o" if found.budget is not None else "s"
        axis.errorbar([at], [score.mean], yerr=spread, fmt=marker, capsize=3, label=name, color=f"C{number % 10}")
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
