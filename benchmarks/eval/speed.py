"""``python -m benchmarks.eval.speed``: decode steps of the evaluation through Inductor, on a machine that is idle.

One batch of `scenes`, whose answers are longest. The dense model runs eagerly, compiled by Inductor alone, and under
the identity plan; then come both papers' methods. A ratio is shown only if, in the same run, compiled dense models
answer as the eager one does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import avl_fx
from avl_fx import Contender, Plan
from benchmarks._report import machine
from benchmarks.eval.contenders import partitioned
from benchmarks.eval.page import MACHINE, RESULTS, SPEED, speeds
from benchmarks.eval.tasks import task_of
from benchmarks.eval.tuned import with_weights_of
from examples.petite_vlm.model import LAZY, READER, load_petite_vlm, trained_under
from examples.petite_vlm.under_plans import allow_graphs

console = Console()
DATA = "scenes"
DENSE = ("Inductor", "identity")
"""Contenders that must answer as the dense model."""
EXACT = 1e-4
"""Nats: what another order of summation may make of an answer."""


@contextlib.contextmanager
def _inductor(model: nn.Module) -> Iterator[None]:
    forward = model.forward
    model.forward = torch.compile(forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward  # the class has its own
        torch._dynamo.reset()


def everyone(adapter: Path) -> dict[str, Contender]:
    """Who is timed; ``adapter`` was trained under lazy plans, and whoever is lazy has its weights: a model that was not
    stops answering before there is a step to time."""
    found = {"Inductor": Contender("Inductor alone", prepare=_inductor), "identity": _under(Plan.identity())}
    found |= {f"A-VL {share:.0%}": _under(partitioned(share)) for share in (0.5, 0.3, 0.1)}
    for plan in trained_under(adapter):
        policy = plan.lazy_policy
        assert policy is not None
        name = f"lazy {len(policy.lazy_layers)}, {policy.mode}"
        found[name] = with_weights_of(adapter, _under(plan))
        if policy.mode == "gla":
            found[f"A-VL 50% and {name}"] = with_weights_of(adapter, _under(partitioned(0.5).combine(plan)))
    return found


def _under(plan: Plan) -> Contender:
    return Contender.of_plan(plan, compiler="inductor", compact=not plan.is_lossless)


def main(
    rows: Annotated[int, typer.Option(help="questions answered together", min=1)] = 16,
    output: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Answer one batch as everyone, and save what their steps take."""
    torch.manual_seed(0)
    allow_graphs()
    model, processor = load_petite_vlm(READER)
    folder = output / f"{DATA}{SPEED}"
    (folder / "answers.jsonl").unlink(missing_ok=True)  # timings of another run are nothing to go on from
    avl_fx.evaluate(model, task_of(DATA, processor, rows, rows), everyone(LAZY), output=folder, limit=1)
    report: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    wrong = [name for name in DENSE if report["results"][name]["divergence"] > EXACT]
    facts = machine() | {"adapter": READER.stem, "rows": rows, "refreshes": True}
    (folder / MACHINE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if wrong:
        console.print(f"[red]{', '.join(wrong)}: not the dense answers, so no ratio is worth anything")
        raise typer.Exit(1)
    console.print("\n".join(speeds(report)), markup=False)


if __name__ == "__main__":
    typer.run(main)
