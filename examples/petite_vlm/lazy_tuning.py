"""Train the petite model with the plan that will serve it: what lazy layers cost, and what a little training wins back.

    python -m examples.petite_vlm.lazy_tuning

The paper (arXiv 2602.01901) tunes its models with lazy layers in place. Here the decoder is compiled under the plan,
and LoRA and projector go on from the committed adapter: gradients pass through the rewritten graph, so the layers
around a lazy one learn to live with inherited queries and keys. Held-out questions are answered before and after, dense
and under the plan, with the right picture and with another one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from avl_fx import Plan

from .data import easy_vqa_dir, load_questions, shuffled_partner
from .lazy_layers import answered, prepared, under
from .model import ADAPTER, load_petite_vlm, read_adapter
from .parts import sha256_of
from .sources import Mixture
from .trainer import Recipe, Trainer
from .under_plans import allow_graphs

console = Console()
FOLDER = Path(__file__).parent / "lazy_layers"


def calibrated(lazy: int, folder: Path = FOLDER) -> Plan:
    """The calibrated blocks with so many lazy layers, as `lazy_layers` measured them.

    Raises:
        ValueError: it measured no such plan.
    """
    facts = json.loads((folder / "figures.json").read_text())
    found = {row["lazy"]: row for row in facts["rows"] if row["mode"] == "gla" and row["blocks"] == "calibrated"}
    if lazy not in found:
        raise ValueError(f"there are calibrated blocks with {sorted(found)} lazy layers, not {lazy}")
    return Plan.lazy([tuple(block) for block in found[lazy]["layout"]], num_layers=facts["layers"])


def tune(trainer: Trainer, plan: Plan, steps: int, compiler: str = "eager") -> None:
    """``steps`` optimiser steps with the decoder compiled under ``plan``."""
    with under(trainer.model, plan, compiler):
        for _ in track(range(steps), description="training under the plan", console=console):
            trainer.train_step()


def accuracy(model: Any, processor: Any, batches: Sequence[dict[str, torch.Tensor]], expected: Sequence[str]) -> float:
    """Share of exact answers."""
    said, _ = answered(model, processor, batches)
    return sum(a == b for a, b in zip(said, expected, strict=True)) / len(expected)


def main(
    lazy: Annotated[int, typer.Option(help="lazy layers: one of the calibrated layouts")] = 15,
    steps: int = 60,
    lora_lr: float = 3e-4,
    projector_lr: float = 1e-4,
    images_per_step: int = 6,
    questions: Annotated[int, typer.Option(help="held-out questions")] = 96,
    batch: int = 16,
    compiler: str = "eager",
    output: Annotated[Path, typer.Option(help="folder for the figures")] = FOLDER,
    adapter: Annotated[Path | None, typer.Option(help="where to write the tuned adapter")] = None,
) -> None:
    """Measure, tune, measure again."""
    allow_graphs()
    plan = calibrated(lazy)
    root = easy_vqa_dir()
    tensors, _ = read_adapter(ADAPTER)
    model, processor = load_petite_vlm(adapter=None)
    recipe = Recipe(
        steps=steps,
        images_per_step=images_per_step,
        lora_lr=lora_lr,
        projector_lr=projector_lr,
        warmup=5,
        cooldown=steps // 3,
        seed=1,
        start=sha256_of(ADAPTER),
    )
    source = Mixture(model, processor, {"easy_vqa": 1.0}, images_per_step, recipe.questions_per_image, recipe.seed)
    trainer = Trainer(model, recipe, source, start=tensors)
    asked = load_questions(root, "test")[:questions]
    expected = [question.answer for question in asked]
    partner = shuffled_partner(sorted({question.image for question in asked}))
    batches = [prepared(processor, root, "test", asked[i : i + batch]) for i in range(0, len(asked), batch)]
    pictures = torch.cat([inputs["pixel_values"] for inputs in batches])
    place = {question.image: number for number, question in enumerate(asked)}
    others = pictures[[place[partner[question.image]] for question in asked]].split(batch)
    shuffled = [{**inputs, "pixel_values": other} for inputs, other in zip(batches, others, strict=True)]

    rows: list[dict[str, Any]] = []

    def measure(when: str) -> None:
        row = {"when": when, "dense": accuracy(model, processor, batches, expected)}
        with under(model, plan, compiler):
            row["lazy"] = accuracy(model, processor, batches, expected)
            row["lazy, other pictures"] = accuracy(model, processor, shuffled, expected)
        rows.append(row)
        console.print(row)

    measure("before")
    tune(trainer, plan, steps, compiler)
    measure("after")
    if adapter is not None:
        trainer.export(adapter)
    facts = {
        "plan": json.loads(plan.to_json()),
        "lazy_layers": lazy,
        "steps": steps,
        "training_questions": sum(int(point["questions"]) for point in trainer.curve),
        "seconds": round(sum(point["seconds"] for point in trainer.curve), 1),
        "questions": len(asked),
        "rows": rows,
        "loss": [round(point["loss"], 4) for point in trainer.curve],
    }
    (output / f"tuning_{lazy}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    table = Table("", "dense", f"{lazy} of {plan.num_layers} layers lazy", "lazy, other pictures")
    for row in rows:
        table.add_row(row["when"], *(f"{row[key]:.1%}" for key in ("dense", "lazy", "lazy, other pictures")))
    console.print(table)
    console.print(f"{facts['training_questions']} training questions, {facts['seconds']:.0f} s")


if __name__ == "__main__":
    typer.run(main)
