"""Whether the methods did what was hoped of them, data set by data set, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.eval.contenders import MODES
from benchmarks.eval.controls import CONTROLS
from benchmarks.eval.prompts import LATE

__all__ = ["verdict"]

HOPED = """Hoped for: at most 1% of the score lost with half of the visual keys, and with lazy layers that save 35% of
the KV bytes; ahead of every control with 30% and with 10%. *Lost* is relative to the dense score, negative where a plan
does better. *Ahead* is the difference in points to the best control of the same share, and whose that is; in brackets
the same in nats, closer to the dense model being ahead. With so few questions a point or two means nothing: the
sections below have the intervals.
"""
LOST = {
    "A-VL 50%": ("A-VL 50%", ""),
    f"A-VL, {LATE} rows 50%": (f"A-VL, {LATE} rows 50%", ""),
    **{f"{lazy}, {mode}": (f"{lazy} ", f", {mode}") for lazy in ("lazy", "tuned lazy") for mode in MODES},
}
"""Column -> how the name of the contender begins and ends."""
OURS = [(way, share) for share in ("30%", "10%") for way in ("A-VL", f"A-VL, {LATE} rows")]
RIVALS = (*CONTROLS, "down-sampled")


def verdict(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, of reports by data set; a cell is empty where nobody was asked."""
    head = ["", "dense", *(f"{column}: lost" for column in LOST), *(f"{way} {share}: ahead" for way, share in OURS)]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for name, report in found.items():
        results: Mapping[str, Any] = report["results"]
        dense = results["dense"]["score"]["mean"]
        cells = [name, f"{dense:.1%}"]
        cells += [_lost(results, *ends, dense) for ends in LOST.values()]
        cells += [_ahead(results, way, share) for way, share in OURS]
        lines.append(f"| {' | '.join(cells)} |")
    return HOPED + "\n" + "\n".join(lines) + "\n"


def _lost(results: Mapping[str, Any], begins: str, ends: str, dense: float) -> str:
    """Of the first contender that is called so and is not both methods at once: the one that saves most."""
    alone = [n for n in results if n.startswith(begins) and n.endswith(ends) and " and " not in n]
    return f"{(dense - results[alone[0]]['score']['mean']) / dense:.1%}" if alone and dense else ""


def _ahead(results: Mapping[str, Any], way: str, share: str) -> str:
    """Points to the best control of a share, and nats to the closest."""
    ours, rivals = results.get(f"{way} {share}"), [name for rival in RIVALS if (name := f"{rival} {share}") in results]
    if ours is None or not rivals:
        return ""
    best = max(rivals, key=lambda name: results[name]["score"]["mean"])
    closest = min(rivals, key=lambda name: results[name]["divergence"])
    points = 100 * (ours["score"]["mean"] - results[best]["score"]["mean"])
    nats = results[closest]["divergence"] - ours["divergence"]
    who, near = (name.removesuffix(f" {share}") for name in (best, closest))
    return f"{points:+.1f} to {who} ({nats:+.4f} to {near})"
