"""``python -m benchmarks.eval``: what both papers' methods cost the petite model in answers, against every control.

For each data set it writes ``<output>/<data set>/evaluation.{json,md,png}`` and every answer; starting again goes on
where it was cut off. ``--quick`` asks a few questions of one data set a task, at one budget.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import avl_fx
from benchmarks._report import machine
from benchmarks.eval.contenders import Blocks, ablations, contenders
from benchmarks.eval.page import ABLATIONS, MACHINE, RESULTS
from benchmarks.eval.tasks import METRIC_OF, task_of
from examples.petite_vlm.data import DATASETS
from examples.petite_vlm.mixture_plans import training_prompts
from examples.petite_vlm.model import LAZY, READER, load_petite_vlm
from examples.petite_vlm.processor import PetiteProcessor

console = Console()
SHARES = (0.5, 0.3, 0.1)
SAVINGS = (0.35, 0.1)
"""Of the KV bytes, by lazy layers: what the paper saves, and what an untuned model may bear."""
QUICK = ("composites", "scenes", "words")
"""One data set a task."""
QUICK_BATCH = 8


def calibrated_blocks(model: torch.nn.Module, processor: PetiteProcessor, name: str, images: int) -> list[Blocks]:
    """Blocks that save so much of the KV bytes each, found on training pictures of a data set; none of no pictures."""
    if not images:
        return []
    batches = list(training_prompts(processor, name, images))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for saving in SAVINGS:  # the model is watched once: the state has all that the next one needs
            plan = avl_fx.calibrate(model, batches, kv_saving=saving, state=Path(folder) / "state")
            assert plan.lazy_policy is not None
            found.append(plan.lazy_policy.blocks)
    return found


def main(
    datasets: Annotated[list[str] | None, typer.Option("--dataset", help="one of the data sets; default: all")] = None,
    shares: Annotated[
        list[float] | None, typer.Option("--share", help="of the visual keys; default: all three")
    ] = None,
    images: Annotated[int, typer.Option(help="held-out pictures of each data set", min=2)] = 100,
    calibration: Annotated[int, typer.Option(help="training pictures to calibrate on; 0: no lazy plans")] = 48,
    adapter: Annotated[Path, typer.Option(help="the adapter file")] = READER,
    tuned: Annotated[
        Path | None,
        typer.Option(
            help="an adapter that was trained under lazy plans; default: the one that goes on from the committed one"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=2)] = 16,
    compiler: str = "eager",
    ablation: Annotated[bool, typer.Option("--ablations", help="A-VL, a setting at a time")] = False,
    only: Annotated[list[str] | None, typer.Option(help="contenders whose names hold one of these words")] = None,
    limit: Annotated[int | None, typer.Option(help="batches of each data set at most", min=1)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="eight questions a task, 30% of the keys, no lazy plans")
    ] = False,
    output: Annotated[Path, typer.Option(help="folder for the results")] = RESULTS,
) -> None:
    """Answer all questions as every contender, and compare."""
    unknown = [name for name in datasets or [] if name not in DATASETS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is no data set: choose among {', '.join(DATASETS)}")
    torch.manual_seed(0)
    model, processor = load_petite_vlm(adapter)
    layers: int = model.config.get_text_config().num_hidden_layers
    if tuned is None and adapter == READER and not quick:
        tuned = LAZY
    budgets = shares or ((0.3,) if quick else SHARES)
    if quick:
        datasets, limit, calibration, batch = datasets or list(QUICK), 1, 0, min(batch, QUICK_BATCH)
    for name in datasets or list(METRIC_OF):
        blocks = calibrated_blocks(model, processor, name, calibration)
        task = task_of(name, processor, images, batch)
        if ablation:
            ways = ablations(budgets[0], blocks[-1] if blocks else (), layers, compiler)
        else:
            ways = contenders(budgets, blocks, layers, compiler, tuned)
        if only:
            ways = {way: contender for way, contender in ways.items() if any(word in way for word in only)}
            if not ways:
                raise typer.BadParameter(f"no contender's name holds {' or '.join(only)}")
        folder = output / (f"{name}{ABLATIONS}" if ablation else name)
        report = avl_fx.evaluate(model, task, ways, output=folder, limit=limit)
        facts = machine() | {"adapter": adapter.stem}
        (folder / MACHINE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        console.print(report.markdown(), markup=False)
    console.print(f"saved in {output}")


if __name__ == "__main__":
    typer.run(main)
