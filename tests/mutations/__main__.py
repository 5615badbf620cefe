"""``python -m tests.mutations``: plant every bug, one at a time, and say which the suite did not notice."""

from __future__ import annotations

import argparse
import os
import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.mutations._catalogue import MUTATIONS, Mutation
from tests.mutations._run import Outcome, Result, Run, run_all, warm_up

STYLES = {Outcome.KILLED: "green", Outcome.SURVIVED: "bold red", Outcome.STALE: "yellow", Outcome.BROKEN: "yellow"}


def main() -> int:
    """Exit status 0 when the tests pass without a bug and every bug was noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutations whose file or name holds one of these words")
    parser.add_argument("--workers", type=int, default=int(os.environ.get("WORKERS", "2")), help="runs at a time")
    options = parser.parse_args()
    console = Console()
    chosen = [m for m in MUTATIONS if not options.words or any(w in f"{m.file} {m.name}" for w in options.words)]
    if not chosen:
        console.print("no mutation holds any of these words")
        return 2
    start = time.perf_counter()
    warm_up()
    # Where the tests fail without any bug, that they fail with one means nothing.
    baselines = [Run(None, tests) for tests in dict.fromkeys(m.tests for m in chosen)]
    results: dict[Mutation, Result] = {}
    failing: list[tuple[Run, Result]] = []
    for run, result in run_all([*baselines, *(Run(m, m.tests) for m in chosen)], options.workers):
        if run.mutation is not None:
            results[run.mutation] = result
            style, name = STYLES[result.outcome], f"{run.mutation.area}: {run.mutation.name}"
        else:
            style, name = ("green" if result.outcome is Outcome.SURVIVED else "bold red"), "no bug planted"
            if result.outcome is not Outcome.SURVIVED:
                failing.append((run, result))
        noticed = result.detail if result.outcome is Outcome.KILLED else ""
        word = "passed" if run.mutation is None and result.outcome is Outcome.SURVIVED else result.outcome
        console.print(f"[{style}]{word:9}[/] {escape(name)} ({result.seconds:.0f} s) [dim]{escape(noticed)}[/]")
    bad = [m for m in chosen if results[m].outcome is not Outcome.KILLED]
    console.print(_table(chosen, results))
    for mutation in bad:
        console.print(f"\n[bold]{mutation.file}: {escape(mutation.name)}[/]\n{escape(results[mutation].detail)}")
    for run, result in failing:
        console.print(f"\n[bold red]fails without any bug:[/] {escape(' '.join(run.tests))}\n{escape(result.detail)}")
    console.print(f"{len(chosen) - len(bad)} of {len(chosen)} noticed, {time.perf_counter() - start:.0f} s")
    return 1 if bad or failing else 0


def _table(chosen: list[Mutation], results: dict[Mutation, Result]) -> Table:
    """One line a file: how many bugs of each outcome."""
    table = Table("file", "planted", *(str(o) for o in Outcome), "s")
    for file in dict.fromkeys(m.file for m in chosen):
        mine = [results[m] for m in chosen if m.file == file]
        counts = [sum(r.outcome is o for r in mine) for o in Outcome]
        cells = [f"[{STYLES[o]}]{n}[/]" if n else "" for o, n in zip(Outcome, counts, strict=True)]
        table.add_row(file, str(len(mine)), *cells, f"{sum(r.seconds for r in mine):.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
