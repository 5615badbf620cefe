"""Draw how the mixture was learnt: ``python -m examples.petite_vlm.stages`` makes a picture of training/stages.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["draw", "questions_after"]

STAGES = Path(__file__).parent / "training" / "stages.json"
PICTURE = STAGES.with_suffix(".png")
ADAPTER = ("all, after alignment", "words above all", "easy-VQA again")
"""The stages of questions and answers that the committed adapter went through, in this order."""
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
    """A matplotlib figure: loss, whole answers and answer tokens over steps."""
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
        axis.set_xlabel("step (6 pictures, up to 48 questions)")
        end = 0
        for stage in stages[:-1]:
            end += stage["steps"]
            axis.axvline(end, color="grey", linewidth=0.8, linestyle=":")
    tokens.legend(fontsize=8)
    return figure


def main(output: Annotated[Path, typer.Option(help="the picture to write")] = PICTURE) -> None:
    """Draw the stages of the committed adapter."""
    draw(questions_after(json.loads(STAGES.read_text()), ADAPTER)).savefig(output, dpi=110)
    typer.echo(f"saved {output}")


if __name__ == "__main__":
    typer.run(main)
