"""Share of the graph passes in compile time, on a 32-layer model.

The passes are Python over a graph of some thousand nodes; Inductor's code generation is what compiling costs. Measured
from the first call of a freshly compiled model: everything Dynamo, the passes and Inductor do, without any cache.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.table import Table

from avl_fx import Plan
from avl_fx.record import recording
from benchmarks._models import llava, prompt
from benchmarks._report import console, save

LAYERS = 32
LIMIT = 0.05
ROUNDS = 3
"""One round tells little: a collection of Python's garbage takes half a second, and falls into a pass or elsewhere."""
PLANS = {"identity": Plan.identity(), "lazy": Plan.lazy([(2, 15), (18, 31)])}


def measure(plan: Plan) -> dict[str, Any]:
    """One prefill and two decode steps, compiled from nothing."""
    torch._dynamo.reset()
    model = llava(layers=LAYERS, hidden=128, heads=4, kv_heads=2, visual_tokens=64)
    inputs = prompt(model, batch=1)
    options = {"plan": plan, "strict": True, "inductor": {"fx_graph_cache": False}}
    model.forward = torch.compile(model.forward, backend="avl", options=options)
    start = time.perf_counter()
    with recording() as recorder:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, disable_compile=True)
    total = time.perf_counter() - start
    passes: dict[str, float] = {}
    for graph in recorder.graphs:
        for result in graph.passes:
            passes[result.name] = passes.get(result.name, 0.0) + result.seconds
    return {
        "graphs": len(recorder.graphs),
        "sites": sum(len(g.sites) for g in recorder.graphs),
        "first_calls_s": round(total, 3),
        "passes_s": round(sum(g.pass_seconds for g in recorder.graphs), 3),
        "share": round(sum(g.pass_seconds for g in recorder.graphs) / total, 4),
        "by_pass_ms": {name: round(seconds * 1e3, 2) for name, seconds in passes.items()},
    }


def main(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Measure every plan in turn, ``rounds`` times; print a table of medians, save the figures."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in PLANS}
    for _ in range(rounds):
        for name, plan in PLANS.items():
            measured[name].append(measure(plan))
    rows = []
    for name, found in measured.items():
        middle = sorted(found, key=lambda row: row["share"])[len(found) // 2]
        rows.append({"plan": name, "layers": LAYERS} | middle | {"shares": [row["share"] for row in found]})
    table = Table(title=f"Share of the passes in compile time, {LAYERS} layers (limit {LIMIT:.0%})")
    for column in ("plan", "graphs", "sites", "first calls", "passes", "share", "of all rounds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["plan"],
            str(row["graphs"]),
            str(row["sites"]),
            f"{row['first_calls_s']:.1f} s",
            f"{row['passes_s'] * 1e3:.0f} ms",
            f"{row['share']:.2%}{'' if row['share'] < LIMIT else '  OVER'}",
            f"{min(row['shares']):.2%}..{max(row['shares']):.2%}",
        )
    console.print(table)
    console.print(f"saved: {save('pass_overhead', rows)}")
    return rows


if __name__ == "__main__":
    main()
