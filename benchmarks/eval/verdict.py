"""Whether the methods did what was hoped of them, data set by data set, in two tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.eval.contenders import MODES, WAYS, kept_to_compute
from benchmarks.eval.controls import CONTROLS

__all__ = ["verdict"]

HOPED = """Hoped for: at most 1% of the score lost with half of the visual keys, and with lazy layers that save 35% of
the KV bytes. *Lost* is relative to the dense score, negative where a plan does better. With so few questions a point or
two means nothing: the sections below have the intervals.
"""
AHEAD = """Hoped for, too: ahead of every control with 30% of the visual keys and with 10%. A-VL keeps more keys than it
computes, so there are two ways to count: controls that *keep* as many, and so compute more, or controls that
*compute* as many (at steps that do not refresh), and so keep fewer. *Ahead* is the difference in points to the best
of them, and whose that is; in brackets the same in nats, closer to the dense model being ahead.
"""
LOST = {
    **{f"{way} 50%": (f"{way} 50%", "") for way in WAYS},
    **{f"{lazy}, {mode}": (f"{lazy} ", f", {mode}") for lazy in ("lazy", "tuned lazy") for mode in MODES},
}
"""Column -> how the name of the contender begins and ends."""
SHARES = (0.3, 0.1)
"""Of the controls."""
COUNTED: Mapping[str, Callable[[float], float]] = {"kept": lambda share: share, "computed": kept_to_compute}
"""What is as much as the controls' -> what A-VL keeps then."""
RIVALS = (*CONTROLS, "down-sampled")


def verdict(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, of reports by data set; a cell is empty where nobody was asked."""
    found = {_asked(name, report): report for name, report in found.items()}
    lost = _table(["dense", *(f"{column}: lost" for column in LOST)], {n: _losses(r) for n, r in found.items()})
    duels = [
        (f"{way} {keeps(share):.0%}", f"{share:.0%}", how)
        for share in SHARES
        for how, keeps in COUNTED.items()
        for way in WAYS
    ]
    ahead = _table(
        [f"{ours}, {share} {how}" for ours, share, how in duels],
        {name: [_ahead(report["results"], ours, share) for ours, share, _ in duels] for name, report in found.items()},
    )
    return f"{HOPED}\n{lost}\n{AHEAD}\n{ahead}"


def _asked(name: str, report: Mapping[str, Any]) -> str:
    """The data set, and the adapter that was asked where that is known."""
    adapter = report.get("machine", {}).get("adapter")
    return name if adapter is None else f"{name}, {adapter}"


def _table(columns: list[str], rows: Mapping[str, list[str]]) -> str:
    lines = [f"| {' | '.join(['', *columns])} |", f"|---|{'---:|' * len(columns)}"]
    lines += [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def _losses(report: Mapping[str, Any]) -> list[str]:
    dense = report["results"]["dense"]["score"]["mean"]
    return [f"{dense:.1%}", *(_lost(report["results"], *ends, dense) for ends in LOST.values())]


def _lost(results: Mapping[str, Any], begins: str, ends: str, dense: float) -> str:
    """Of the first contender that is called so and is not both methods at once: the one that saves most."""
    alone = [n for n in results if n.startswith(begins) and n.endswith(ends) and " and " not in n]
    return f"{(dense - results[alone[0]]['score']['mean']) / dense:.1%}" if alone and dense else ""


def _ahead(results: Mapping[str, Any], ours: str, share: str) -> str:
    """Points of the contender ``ours`` to the best control of a share, and nats to the closest."""
    own, rivals = results.get(ours), [name for rival in RIVALS if (name := f"{rival} {share}") in results]
    if own is None or not rivals:
        return ""
    best = max(rivals, key=lambda name: results[name]["score"]["mean"])
    closest = min(rivals, key=lambda name: results[name]["divergence"])
    points = 100 * (own["score"]["mean"] - results[best]["score"]["mean"])
    nats = results[closest]["divergence"] - own["divergence"]
    who, near = (name.removesuffix(f" {share}") for name in (best, closest))
    return f"{points:+.1f} to {who} ({nats:+.4f} to {near})"
