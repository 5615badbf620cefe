"""Draw how adapters were learnt: ``python -m examples.petite_vlm.stages`` makes pictures of training/stages.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["draw", "draw_modes", "questions_after"]

STAGES = Path(__file__).parent / "training" / "stages.json"
ADAPTER = ("all, after alignment", "words above all", "easy-VQA again")
"""The stages of questions and answers that the committed adapter went through, in this order."""
READER = ("on an H200", "cooled down")
"""The stage that made `model.READER` of it, and one that went on on a CPU and won nothing."""
UNDER_PLANS = "under lazy plans"
"""The stage that made `model.LAZY` of it: its steps were done under plans of several modes in turn."""
LEARNT = ("easy_vqa", "composites", "scenes", "words", "documents", "captions")


def questions_after(stages: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The stages of these names with their steps counted on from the one before.

    Raises:
        KeyError: there is no stage of that name.
    """
    known = {stage["name"]: stage for stage in stages}
    found, before = [], 0
    for name in names:
        stage = known[name]
        moved = {
            key: [point | {"step": point["step"] + before} for point in stage[key]] for key in ("curve", "evaluations")
        }
        found.append(stage | moved)
        before += stage["steps"]
    return found


def draw(stages: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure: loss, whole answers and answer tokens over steps; a dotted line where a stage begins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss, whole, tokens = figure.subplots(1, 3)
    points = [point for stage in stages for point in stage["curve"]]
    loss.semilogy([p["step"] for p in points], [p["loss"] for p in points])
    loss.set_title("training loss, every tenth step")
    for axis, suffix, title in ((whole, "", "whole answers, held out"), (tokens, " tokens", "answer tokens, held out")):
        for name in LEARNT:
            asked = [(p["step"], p[name + suffix]) for stage in stages for p in stage["evaluations"] if name in p]
            axis.plot([step for step, _ in asked], [share for _, share in asked], marker="o", markersize=3, label=name)
        axis.set_ylim(-0.02, 1.02)
        axis.set_title(title)
    for axis in (loss, whole, tokens):
        sizes = dict.fromkeys(stage["images_per_step"] for stage in stages)
        axis.set_xlabel(f"step of {', then '.join(map(str, sizes))} pictures")
        end = 0
        for stage in stages[:-1]:
            end += stage["steps"]
            axis.axvline(end, color="grey", linewidth=0.8, linestyle=":")
    tokens.legend(fontsize=8)
    return figure


def draw_modes(stage: dict[str, Any], together: int = 10) -> Any:
    """A matplotlib figure: by mode the loss, ``together`` of its steps in one point, and answer tokens of data sets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.8), layout="constrained")
    modes: list[str] = stage["modes"]
    loss, *panels = figure.subplots(1, 1 + len(modes))
    for number, mode in enumerate(modes):
        own = stage["curve"][number :: len(modes)]
        groups = [own[start : start + together] for start in range(0, len(own), together)]
        means = [sum(point["loss"] for point in group) / len(group) for group in groups]
        loss.semilogy([group[-1]["step"] for group in groups], means, marker="o", markersize=3, label=mode)
    loss.set_title(f"loss, means of {together} steps", fontsize=11)
    loss.legend(fontsize=8)
    for axis, mode in zip(panels, modes, strict=True):
        for name in LEARNT:
            asked = [(p["step"], p[f"{name}, {mode} tokens"]) for p in stage["evaluations"]]
            axis.plot([step for step, _ in asked], [share for _, share in asked], marker="o", markersize=3, label=name)
        axis.set_ylim(-0.02, 1.02)
        axis.set_title(f"answer tokens, held out: {mode}", fontsize=11)
    panels[-1].legend(fontsize=8)
    for axis in (loss, *panels):
        axis.set_xlabel("step (6 pictures)")
    return figure


def main(output: Annotated[Path, typer.Option(help="folder for the pictures")] = STAGES.parent) -> None:
    """Draw the stages of the committed adapters."""
    stages = json.loads(STAGES.read_text())
    (under,) = [stage for stage in stages if stage["name"] == UNDER_PLANS]
    pictures = {
        "stages.png": draw(questions_after(stages, ADAPTER)),
        "reader.png": draw(questions_after(stages, READER)),
        "under_plans.png": draw_modes(under),
    }
    for name, picture in pictures.items():
        picture.savefig(output / name, dpi=110)
        typer.echo(f"saved {output / name}")


if __name__ == "__main__":
    typer.run(main)
