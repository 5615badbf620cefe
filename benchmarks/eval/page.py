"""``python -m benchmarks.eval.page``: the results of all data sets on one page, docs/results.md."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.eval.controls import CONTROLS
from benchmarks.eval.tasks import METRIC_OF
from benchmarks.eval.verdict import verdict
from examples.petite_vlm.data import DATASETS

__all__ = ["page", "speeds"]

RESULTS = Path(__file__).parents[1] / "results" / "eval"
ABLATIONS = "-ablations"
"""What the folder of a data set's ablations is called, behind its name."""
SPEED = "-speed"
"""What the folder of `benchmarks.eval.speed` is called, behind the data set's name."""
MACHINE = "machine.json"
"""What the milliseconds of a folder were measured on, and the adapter that was asked."""
OVERLAYS = "overlays"
"""Where in the folder of the results `benchmarks.eval.overlay` puts its pictures."""
INTRO = """# What the methods cost in answers

Written by `python -m benchmarks.eval.page` from `benchmarks/results/eval`, which `make eval` makes (all questions
about 100 pictures of each data set; with `--limit` so many batches of 16: the sections say how many were asked). The
model is [petite_vlm](../examples/petite_vlm/README.md#trained-on-a-gpu) with the adapter that stands beside each data
set; pictures are held out, answers greedy, the prompt is always dense. Scores stand with 95% bootstrap intervals over
pictures. **to dense** is the difference in points, question by question. **nats** is the divergence from the dense
model along its own answers. **KV** is the cache in shares of the dense one's bytes: plans run on an `AVLCache`;
controls hide keys by masks, and nothing is said of them. Steps were timed by themselves, through Inductor:
[speed](#speed).

*A-VL s* keeps a share s of the visual keys and computes 0.6 s at steps that do not refresh (every third does), so it
reads less than any control at the same s, which reads s at every step; *A-VL 17%* computes 10%, as these controls do
at 10%, and *A-VL 50%* 30%. It scores by the last token of the prompt, as the paper does; *A-VL, 8 rows s* by the last
eight, which all stand behind the picture here; *A-VL, spread s* chooses half of what it keeps so, and spreads the other
half evenly over the picture (`Plan.avl(spread=0.5)`). Controls choose once, at the end of the prompt:

| control | keeps |
|---|---|
| random | visual keys at random, anew for each layer |
| strided | every n-th visual key |
| FastV-like | what the last token attends to in layer 2, for all layers behind it |
| no refresh | what the last token attends to, layer by layer |
| SnapKV-like | what the last eight tokens attend to, layer by layer |
| window | the first four tokens and the latest ones |
| H2O | what the whole prompt attended to most, and the latest ones |
| down-sampled | a smaller picture, prompt included |
| other pictures | all keys, of another picture: what can be said without looking |

*lazy n* has n lazy layers of 30. *tuned lazy n* has the weights of `adapter/lazy_35.safetensors`, which were trained
under such plans, from the mixture on, which reads less; it too is compared with the dense reader. *tuned, dense* are
these weights without a plan.

kvpress is not among them: 0.5.5, the newest, needs a transformers older than 5.3. Its SnapKV looks at more rows, pools
what they see, and chooses for each head.
"""


DIFFERENCES = (
    (
        "The prompt is dense",
        "A-VL drops half of the visual tokens behind layer 2",
        "Controls choose at the end of a prompt, too. So the first token is the dense one, and short answers show "
        "little; `Plan.avl(prefill=0.5)` is what the paper does",
    ),
    (
        "Text is kept whole, but for two ablations",
        "A-VL keeps 60% of it",
        "Controls differ in how they treat images; text must not decide between them",
    ),
    (
        "Core is 0.6 of what is kept, chosen anew at every third step",
        "0.3 of all where 0.5 is kept, at every third step",
        "The same ratio, at every budget",
    ),
    (
        "Under a lazy plan core is chosen once a block",
        "The papers do not meet",
        "A lazy layer has no scores of its own: it reads what its anchor reads",
    ),
    (
        "Blocks save 35% of the KV bytes, or 10%, and differ least, over all ways to cut",
        "Neighbours whose divergence is below a threshold",
        "A budget can be compared; `calibrate` knows the threshold too",
    ),
    (
        "*lazy* runs a model that was not trained to be lazy; *tuned lazy* one that was, under the three plans in turn",
        "Q Cache tunes with lazy layers in place, for one of them",
        "What a plan costs a model that is served as it is, and what "
        "[little training](../examples/petite_vlm/README.md#trained-to-be-lazy) wins back",
    ),
)
"""Here, there, why."""
HEADER = ["| | score | 95% interval | to dense | nats | KV |", "|---|---:|---:|---:|---:|---:|"]


def page(
    found: Mapping[str, Mapping[str, Any]],
    ablations: Mapping[str, Mapping[str, Any]],
    timed: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The page, of reports by data set: all contenders, A-VL with one setting changed at a time, and speed."""
    differences = ["| here | there | why |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in DIFFERENCES)]
    parts = [
        INTRO,
        "## What was hoped for\n",
        verdict(found),
        *(_speed(name, report) for name, report in (timed or {}).items()),
        "## Where this is not what the papers did\n\n" + "\n".join(differences) + "\n",
    ]
    for name, report in found.items():
        parts += _section(f"## {name}: {DATASETS[name].task}, {report['metric']}\n", report)
    if ablations:
        parts.append("## Ablations\n\nA-VL at one budget, one setting changed at a time.\n")
    for name, report in ablations.items():
        parts += _section(f"### {name}: {report['metric']}\n", report)
    return "\n".join(parts)


def _speed(name: str, report: Mapping[str, Any]) -> str:
    where = report["machine"]
    # Runs that do not say so took medians of single steps.
    of_refreshes = (
        "the mean over the steps from one refresh to the next;\nmedians of these."
        if where.get("refreshes")
        else "a step that does not refresh;\none in three does, and takes longer."
    )
    said = (
        f"One batch of {where['rows']} `{name}` through Inductor, on a machine that did nothing else\n"
        f"({where['processor']}, threads: {where['threads']}): a decode step behind prompts of 256 visual tokens\n"
        f"(`python -m benchmarks.eval.speed`), asked of `{where['adapter']}`; of A-VL {of_refreshes}\n"
        "The compiled dense models answered as the eager one. Not timed is who stopped answering before a step that\n"
        "compiled nothing. With such short prompts a step is weights;\n"
        "[decode.json](../benchmarks/results/decode.json) has longer ones, and lazy layers are timed in\n"
        "[lazy_layers_amd_epyc.json](../benchmarks/results/lazy_layers_amd_epyc.json).\n"
    )
    return "## Speed\n\n" + said + "\n" + "\n".join(speeds(report)) + "\n"


def speeds(report: Mapping[str, Any]) -> list[str]:
    """Lines of a table: a decode step, and the ratio to that of Inductor alone."""
    results = report["results"]
    lines, base = ["| | ms | over Inductor |", "|---|---:|---:|"], results["Inductor"]["step_seconds"]
    for name, result in results.items():
        step, shown = result["step_seconds"], "eager" if name == "dense" else name
        timed = "not timed |" if step is None else f"{1e3 * step:.1f} | {base / step:.2f}x"
        lines.append(f"| {shown} | {timed} |")
    return lines


def _section(heading: str, report: Mapping[str, Any]) -> list[str]:
    """What was asked, and a line for each contender."""
    lines = list(HEADER)
    for contender, result in report["results"].items():
        score, gained = result["score"], result["difference"]
        to_dense = (
            ""
            if contender == "dense"
            else f"{100 * gained['mean']:+.1f} ({100 * gained['low']:+.1f} to {100 * gained['high']:+.1f})"
        )
        masked = contender.startswith(tuple(CONTROLS))
        stored = "" if masked else f"{result['kv_share']:.0%}"
        lines.append(
            f"| {contender} | {score['mean']:.1%} | {score['low']:.1%} to {score['high']:.1%} | {to_dense} "
            f"| {result['divergence']:.3f} | {stored} |"
        )
    asked = f"{report['questions']} questions about {report['groups']} pictures"
    adapter = report.get("machine", {}).get("adapter")
    asked += ".\n" if adapter is None else f", asked of `{adapter}`.\n"
    pictures = [f"![{said}]({path})\n" for said, path in report.get("pictures", {}).items()]
    return [heading, asked, "\n".join(lines) + "\n", *pictures]


def main(
    results: Annotated[Path, typer.Option(help="folder that `make eval` wrote")] = RESULTS,
    output: Annotated[Path, typer.Option(help="the page")] = Path("docs/results.md"),
) -> None:
    """Write the page."""
    found, ablations = (_read(results, suffix, output.parent) for suffix in ("", ABLATIONS))
    if not found:
        raise typer.BadParameter(f"there are no results in {results}: run make eval")
    output.write_text(page(found, ablations, _read(results, SPEED, output.parent)), encoding="utf-8")
    typer.echo(f"wrote {output}: {', '.join(found)}")


def _read(results: Path, suffix: str, beside: Path) -> dict[str, Any]:
    """Reports by data set, as far as there are any, each with its machine and pictures, by paths from the page."""
    found = {}
    for name in METRIC_OF:
        folder = results / f"{name}{suffix}"
        if not (folder / "evaluation.json").exists():
            continue
        report = json.loads((folder / "evaluation.json").read_text())
        if (folder / MACHINE).exists():
            report["machine"] = json.loads((folder / MACHINE).read_text())
        drawn = {
            f"{name}: score over the share of the visual keys": folder / "evaluation.png",
            f"{name}: core, secondary and minor tokens, layer by layer, and core over an answer": results
            / OVERLAYS
            / f"{name}{suffix}.png",
        }
        report["pictures"] = {
            said: Path(os.path.relpath(path, beside)).as_posix() for said, path in drawn.items() if path.exists()
        }
        found[name] = report
    return found


if __name__ == "__main__":
    typer.run(main)
