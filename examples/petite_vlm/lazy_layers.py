"""How many lazy layers the petite model bears, by mode: calibrated blocks against random ones of equal size.

    python -m examples.petite_vlm.lazy_layers

Calibrates on training images, then answers held-out questions under plans with more and more lazy layers. An answer
counts when it is exactly right. Accuracy of this model is close to 100%, so beside it stands what notices more: the
Kullback-Leibler divergence of the first answer token from the dense model's, in nats, averaged over questions. Every
plan also meets the eager oracle of the tests on the first batch: the loss is the method's, not the compiler's.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

import avl_fx
from avl_fx import Plan
from tests.oracle.lazy import lazy_oracle

from .data import Question, by_image, easy_vqa_dir, load_questions, open_image
from .model import load_petite_vlm

console = Console()
Mode = Literal["gla", "vla", "vla_scores"]
PREFIX = "model.language_model.layers"
FOLDER = Path(__file__).parent / "lazy_layers"


def prepared(processor: Any, root: Path, split: Any, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
    """Model inputs of one batch."""
    images = [open_image(root, split, question.image) for question in questions]
    return processor.prepare(images, [question.text for question in questions])


def random_blocks(layers: int, lazy: int, seed: int) -> list[tuple[int, int]]:
    """Blocks in which ``lazy`` layers, drawn at random among all but the first, inherit from the layer before them that
    is not lazy."""
    chosen = set(random.Random(seed).sample(range(1, layers), lazy))
    anchors = [layer for layer in range(layers) if layer not in chosen]
    ends = [*(anchor - 1 for anchor in anchors[1:]), layers - 1]
    return [(first, last) for first, last in zip(anchors, ends, strict=True) if last > first]


@torch.no_grad()
def answered(model: Any, processor: Any, batches: Sequence[dict[str, torch.Tensor]]) -> tuple[list[str], torch.Tensor]:
    """Greedy answers, and log-probabilities of the first token ``[questions, vocabulary]``."""
    said, first = [], []
    for inputs in batches:
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        said += processor.decode(out.sequences, inputs["input_ids"].shape[1])
        first.append(out.logits[0].float().log_softmax(-1))
    return said, torch.cat(first)


@contextlib.contextmanager
def under(model: Any, plan: Plan, compiler: str) -> Iterator[None]:
    """``model`` compiled with ``plan``."""
    avl_fx.compile(model, plan, options={"compiler": compiler, "strict": True})
    try:
        yield
    finally:
        avl_fx.uncompile(model)
        torch._dynamo.reset()


def main(
    calibration: Annotated[int, typer.Option(help="training images to calibrate on")] = 100,
    questions: Annotated[int, typer.Option(help="held-out questions")] = 96,
    shares: Annotated[list[float] | None, typer.Option("--share", help="share of lazy layers")] = None,
    modes: Annotated[list[str] | None, typer.Option("--mode", help="gla, vla or vla_scores")] = None,
    seeds: Annotated[int, typer.Option(help="random block plans for each share, mode gla")] = 2,
    batch: int = 16,
    compiler: str = "eager",
    output: Annotated[Path, typer.Option(help="folder for the table, the figures and the calibration")] = FOLDER,
) -> None:
    """Calibrate, measure, print and save."""
    torch.manual_seed(0)
    root = easy_vqa_dir()
    model, processor = load_petite_vlm()
    layers = model.config.get_text_config().num_hidden_layers
    learnt = [group[0] for group in by_image(load_questions(root, "train"))[:calibration]]
    asked = load_questions(root, "test")[:questions]
    output.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    samples = [prepared(processor, root, "train", learnt[i : i + batch]) for i in range(0, len(learnt), batch)]
    state = output / "calibration.npz"
    state.unlink(missing_ok=True)
    plans: dict[tuple[str, float], Plan] = {}
    chosen = shares or [0.2, 0.35, 0.5, 0.7]
    for share in chosen:
        for mode in modes or get_args(Mode):
            # The state holds the statistics: the model runs for the first of these alone.
            report = output if (share, mode) == (chosen[0], "gla") else None
            plans[mode, share] = avl_fx.calibrate(
                model, samples, lazy_share=share, mode=mode, state=state, report=report
            )
    calibrating = time.perf_counter() - start
    state.unlink(missing_ok=True)

    batches = [prepared(processor, root, "test", asked[i : i + batch]) for i in range(0, len(asked), batch)]
    visual = batches[0]["input_ids"] == model.config.image_token_id
    dense_said, dense = answered(model, processor, batches)

    def measure(plan: Plan, name: str) -> dict[str, Any]:
        policy = plan.lazy_policy
        assert policy is not None
        with under(model, plan, compiler):
            said, first = answered(model, processor, batches)
        with lazy_oracle(model, policy.blocks, PREFIX, mode=policy.mode, visual=visual):
            _, oracle = answered(model, processor, batches[:1])
        divergence = (dense.exp() * (dense - first)).sum(-1)
        row = {
            "blocks": name,
            "mode": policy.mode,
            "lazy": len(policy.lazy_layers),
            "share": round(len(policy.lazy_layers) / layers, 3),
            "accuracy": sum(a == q.answer for a, q in zip(said, asked, strict=True)) / len(asked),
            "agreement": sum(a == b for a, b in zip(said, dense_said, strict=True)) / len(asked),
            "kl_nats": divergence.mean().item(),
            "from_oracle": (first[: len(oracle)].exp() - oracle.exp()).abs().max().item(),
            "layout": [list(block) for block in policy.blocks],
        }
        console.print(f"{name} {plan}: {row['accuracy']:.1%}, KL {row['kl_nats']:.4f}")
        if not math.isclose(row["from_oracle"], 0.0, abs_tol=1e-3):
            raise typer.Exit(1)
        return row

    rows = []
    for (mode, _), plan in plans.items():
        rows.append(measure(plan, "calibrated"))
        if mode == "gla":
            assert plan.lazy_policy is not None
            lazy = len(plan.lazy_policy.lazy_layers)
            for seed in range(seeds):
                rows.append(measure(Plan.lazy(random_blocks(layers, lazy, seed), num_layers=layers), f"random {seed}"))

    accuracy = sum(a == q.answer for a, q in zip(dense_said, asked, strict=True)) / len(asked)
    facts = {
        "layers": layers,
        "questions": len(asked),
        "dense_accuracy": accuracy,
        "calibration_images": len(learnt),
        "calibration_seconds": round(calibrating, 1),
        "rows": rows,
    }
    (output / "figures.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(markdown(facts), encoding="utf-8")
    table = Table("lazy layers", "mode", "blocks", "accuracy", "as dense", "KL in nats")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    console.print(f"dense {accuracy:.1%}; calibrated on {len(learnt)} images in {calibrating:.0f} s; saved in {output}")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    return (
        f"{row['lazy']} ({row['share']:.0%})",
        row["mode"],
        row["blocks"],
        f"{row['accuracy']:.1%}",
        f"{row['agreement']:.1%}",
        f"{row['kl_nats']:.4f}",
    )


def markdown(facts: dict[str, Any]) -> str:
    """The table as Markdown."""
    head = ("lazy layers", "mode", "blocks", "accuracy", "as dense", "KL in nats")
    lines = [
        f"{facts['questions']} held-out questions; dense: {facts['dense_accuracy']:.1%}. Calibrated on "
        f"{facts['calibration_images']} training images in {facts['calibration_seconds']:.0f} s.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    return "\n".join(lines + [f"| {' | '.join(cells(row))} |" for row in facts["rows"]]) + "\n"


if __name__ == "__main__":
    typer.run(main)
