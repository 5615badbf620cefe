"""`python -m benchmarks.gpu`: the GPU tests, and decode steps, prompts and attention at 7B shapes, into one JSON file.

A *cell* is one phase at one model and batch; in it every contender is measured on the same model, one after the other,
and compared. Cells are independent: `--only 'decode/llava-1.5-7b/*'` chooses some of them, an interrupted run is
continued by starting it again, and what failed is in the file with its reason. `--budget` ends a run in time where a
machine is lent for minutes. Without a GPU, `--device cpu --tiny` rehearses everything at toy sizes.
"""

from __future__ import annotations

import fnmatch
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from benchmarks._report import RESULTS, console
from benchmarks.gpu.environment import describe
from benchmarks.gpu.gpu_tests import run_gpu_tests
from benchmarks.gpu.results import Results, compare
from benchmarks.gpu.settings import BATCHES, PHASES, TESTS, TINY_BATCHES, Cell, Settings
from benchmarks.gpu.shapes import SHAPES, TINY
from benchmarks.gpu.worker import Worker, contender_names

FIRST_ESTIMATE = 120.0
"""Seconds that a cell is expected to take before one of them was seen."""
NO_GPU = 2


def cells(settings: Settings) -> list[Cell]:
    """The whole grid, in the order in which it is measured."""
    models, batches = (TINY, TINY_BATCHES) if settings.tiny else (SHAPES, BATCHES)
    grid = [
        Cell(phase, name, batch)
        for phase in PHASES
        for name, model in models.items()
        if phase in model.phases
        for batch in batches
    ]
    return ([TESTS] if settings.device != "cpu" else []) + grid


def main(
    device: Annotated[str, typer.Option(help="where to measure")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="toy sizes: a rehearsal, whose times mean nothing")] = False,
    layers: Annotated[int, typer.Option(help="decoder layers; 28 or 32 are the whole models", min=1)] = 4,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    steps: Annotated[int, typer.Option(help="timed decode steps, a multiple of 3", min=3)] = 60,
    prompts: Annotated[int, typer.Option(help="timed prompts", min=1)] = 10,
    only: Annotated[list[str] | None, typer.Option(help="cells, as shell patterns; see --list")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="contenders, as shell patterns")] = None,
    extra: Annotated[list[str] | None, typer.Option(help="modules that add contenders when imported")] = None,
    codegen: Annotated[bool, typer.Option(help="let Inductor generate code (not: a quick rehearsal)")] = True,
    output: Annotated[Path | None, typer.Option(help="the JSON file; benchmarks/results/gpu.json on a GPU")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one contender may take", min=1)] = 300,
    budget: Annotated[float | None, typer.Option(help="seconds after which no cell is begun that may not end")] = None,
    again: Annotated[bool, typer.Option("--again", help="measure anew what is in the file")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="measure anew the cells in which a contender failed")] = False,
    commit: Annotated[str | None, typer.Option(help="of these sources, where git is not at hand")] = None,
    list_cells: Annotated[bool, typer.Option("--list", help="name the cells and end")] = False,
    show: Annotated[Path | None, typer.Option(help="print what a results file holds, and end", exists=True)] = None,
) -> None:
    """Measure what is missing in the file, and say what is wrong or failed."""
    if show is not None:
        for entry in json.loads(show.read_text(encoding="utf-8"))["cells"]:
            _show(entry)
        return
    settings = Settings(device, tiny, dtype, 2 if tiny else layers, steps, prompts, codegen, tuple(extra or ()))
    chosen = [cell for cell in cells(settings) if not only or any(fnmatch.fnmatch(cell.id, p) for p in only)]
    if list_cells:
        console.print("\n".join(cell.id for cell in chosen), highlight=False)
        return
    _check(settings, chosen, output)
    run = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(device, commit),
        "settings": settings.summary(),
    }
    results = Results(output or RESULTS / "gpu.json", run)
    worker = Worker(settings, timeout)
    begun, longest, left = time.monotonic(), FIRST_ESTIMATE, []
    try:
        for cell in chosen:
            known = None if again else results.cell(cell)
            names = [] if cell == TESTS else _chosen_names(cell, settings, contender)
            if known is not None and _is_complete(known, names, retry):
                console.print(f"{cell.id}: in the file already")
                continue
            start = time.monotonic()
            if budget is not None and start - begun + longest > budget:
                left.append(cell.id)
                continue
            entry = results.begin(cell)
            if cell == TESTS:
                entry |= run_gpu_tests(timeout=4 * timeout)
            else:
                _measure(cell, names, entry, worker, results)
            entry["seconds"] = round(time.monotonic() - start, 1)
            longest = max(longest if longest != FIRST_ESTIMATE else 0.0, entry["seconds"])
            results.save()
            _show(entry)
    finally:
        worker.close()
        results.save()
    console.print(f"saved: {results.path}")
    if left:
        console.print(f"[yellow]no time left for {len(left)} cells; run this again to continue: {', '.join(left)}")
    troubles = [trouble for cell in chosen for trouble in _troubles(results.cell(cell))]
    for trouble in troubles:
        console.print(trouble, style="red", markup=False, highlight=False)
    if troubles:
        raise typer.Exit(1)


def _check(settings: Settings, chosen: list[Cell], output: Path | None) -> None:
    """End with a clear word where nothing can be measured."""
    if settings.device != "cpu" and not torch.cuda.is_available():
        console.print(
            "[red]no GPU is visible to PyTorch: nothing was measured.[/red] Run this on a machine with a CUDA or ROCm "
            "device and a PyTorch built for it; `--device cpu --tiny --output FILE` rehearses it without one."
        )
        raise typer.Exit(NO_GPU)
    if settings.device == "cpu" and output is None:
        raise typer.BadParameter(
            "give --output: figures of a CPU do not belong among the results", param_hint="--output"
        )
    if settings.steps % 3:
        raise typer.BadParameter("give a multiple of 3: every third step is a refresh", param_hint="--steps")
    if not chosen:
        raise typer.BadParameter("no cell has such a name; --list shows all", param_hint="--only")


def _chosen_names(cell: Cell, settings: Settings, patterns: list[str] | None) -> list[str]:
    names = contender_names(cell, settings)
    return [name for name in names if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)]


def _is_complete(entry: dict[str, Any], names: list[str], retry: bool) -> bool:
    failed = any(row["status"] == "failed" for row in entry["contenders"].values()) or entry.get("failed")
    return entry["complete"] and set(names) <= set(entry["contenders"]) and not (retry and failed)


def _measure(cell: Cell, names: list[str], entry: dict[str, Any], worker: Worker, results: Results) -> None:
    """All contenders of one cell, each as far as it gets."""
    answer = worker.prepare(cell)
    entry["facts"] = answer.get("facts", {})
    for name in names:
        row = worker.measure(cell, name) if "reason" not in answer else {"reason": f"the cell: {answer['reason']}"}
        row = {**_description(cell, name), **row}
        gate = row.get("gate")
        row["status"] = "failed" if gate is None else "right" if gate["passed"] else "wrong"
        entry["contenders"][name] = row
        results.save()
    if "copy_bytes_per_second" in entry["facts"]:
        compare(entry, entry["facts"]["copy_bytes_per_second"])
    entry["complete"] = True


def _description(cell: Cell, name: str) -> dict[str, Any]:
    from benchmarks.gpu.attention import WAYS
    from benchmarks.gpu.contenders import CONTENDERS

    taking_part: Any = WAYS[name] if cell.phase == "attention" else CONTENDERS[name]
    return {"plan": "partitioned" if taking_part.partitioned else "dense", "ours": taking_part.ours}


def _troubles(entry: dict[str, Any] | None) -> list[str]:
    """What of ours is not right; that a baseline fails is a result."""
    if entry is None:
        return []
    found = [f"{entry['id']}: {name}" for name in entry.get("failed", [])]
    if "reason" in entry:
        found.append(f"{entry['id']}: {entry['reason']}")
    for name, row in entry["contenders"].items():
        if row["ours"] and row["status"] != "right":
            reason = row["reason"] if row["status"] == "failed" else row["gate"]["reason"]
            found.append(f"{entry['id']}: {name}: {row['status']}: {_short(reason)}")
    return found


def _short(reason: str) -> str:
    return next(iter(reason.splitlines()), "")


def _show(entry: dict[str, Any]) -> None:
    if "passed" in entry:
        console.print(f"tests: {entry['passed']} passed, {entry['skipped']} skipped, {len(entry['failed'])} failed")
    if not entry["contenders"]:
        return
    table = Table(title=f"{entry['id']} ({entry['seconds']:.0f} s)")
    for column in ("contender", "median ms", "deciles 1, 9", "of a copy", "over the fastest baseline"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, row in entry["contenders"].items():
        if row["status"] != "right":
            reason = row["reason"] if row["status"] == "failed" else row["gate"]["reason"]
            table.add_row(name, row["status"], "", "", escape(_short(reason)[:80]))
            continue
        times = row["ms"]
        table.add_row(
            name,
            f"{times['median']:.3f}",
            f"{times['deciles'][0]:.3f}, {times['deciles'][8]:.3f}",
            f"{row['of_copy']:.0%}" if "of_copy" in row else "",
            f"{row['over_fastest']:.2f}x" if "over_fastest" in row else "",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
