"""Train the adapter: `python -m examples.petite_vlm.train --help`. Stops and resumes anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import matplotlib
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import LlavaForConditionalGeneration

from avl_fx import Plan

from .ahead import Ahead
from .data import by_image, easy_vqa_dir, load_questions
from .features import image_features
from .model import FEATURE_LAYERS, load_petite_vlm, read_adapter, trained_at
from .packing import Encoded, encode_question
from .parts import sha256_of
from .processor import PetiteProcessor
from .sources import Epochs, Mixture, Source, parse_mixture
from .trainer import Precision, Recipe, Trainer, teacher_forced_accuracy
from .under_plans import in_mode

console = Console()


def epochs(model: LlavaForConditionalGeneration, processor: PetiteProcessor, recipe: Recipe) -> Epochs:
    """easy-VQA's training images in epochs, encoded once and kept."""
    root = easy_vqa_dir()
    prefix: list[int] = []
    groups: list[list[Encoded]] = []
    for group in by_image(load_questions(root, "train")):
        encoded = [encode_question(processor, question, model.config.image_token_id) for question in group]
        prefix = encoded[0][0]
        groups.append([item for _, item in encoded])
    features = image_features(model, root, "train", processor.image_size)
    return Epochs(groups, features, prefix, recipe.images_per_step, recipe.questions_per_image, recipe.seed)


class HeldOut:
    """Test pictures of every data set that is trained on, looked at now and then."""

    def __init__(self, mixture: Mixture, images: int) -> None:
        self.mixture = mixture
        self.rows = {name: [mixture.row(name, image)[1] for image in range(images)] for name in mixture.weights}
        # Pictures do not change: they are encoded once.
        self.features = {name: mixture.features([(name, i) for i in range(images)]).half() for name in mixture.weights}

    def point(self, model: LlavaForConditionalGeneration, shuffled: bool) -> dict[str, float]:
        """By data set, the share of questions answered and of answer tokens; and answered with other pictures."""
        found: dict[str, float] = {}
        for name, rows in self.rows.items():
            for control in (False, True) if shuffled else (False,):

                def seen(some: Sequence[Sequence[Encoded]], name: str = name, shift: int = control) -> torch.Tensor:
                    numbers = [(row[0].question.image + shift) % len(self.features[name]) for row in some]
                    return self.features[name][numbers].float()

                hits, tokens = teacher_forced_accuracy(model, rows, seen, self.mixture.prefix, rows_at_once=4)
                found |= {f"{name} shuffled": hits} if control else {name: hits, f"{name} tokens": tokens}
        return found


def plot(trainer: Trainer, path: Path) -> None:
    """Loss, training accuracy and held-out accuracy against the step."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    steps = [p["step"] for p in trainer.curve]
    left.semilogy(steps, [p["loss"] for p in trainer.curve], lw=0.8)
    left.set(xlabel="step", ylabel="loss on answer tokens")
    names = [
        key for key in (trainer.evaluations or [{}])[-1] if key != "step" and not key.endswith((" tokens", " shuffled"))
    ]
    for name in names:
        points = [e for e in trainer.evaluations if name in e]
        (line,) = right.plot([e["step"] for e in points], [e[name] for e in points], "o-", ms=3, label=name)
        control = [e for e in points if f"{name} shuffled" in e]
        shown = [e[f"{name} shuffled"] for e in control]
        right.plot([e["step"] for e in control], shown, "s--", ms=3, lw=0.8, color=line.get_color())
    right.set(xlabel="step", ylabel="held-out questions answered", ylim=(0, 1.02), title="dashed: pictures shuffled")
    if names:
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="folder for checkpoint, curve and adapter")] = Path("out/petite_vlm"),
    data: Annotated[str, typer.Option(help="data sets and weights, as composites:3,words:2")] = Recipe.data,
    image_size: Annotated[int, typer.Option(help="pixels, a multiple of 14")] = Recipe.image_size,
    start: Annotated[Path | None, typer.Option(help="an adapter of the same rank to go on from")] = None,
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", help="train under this plan; under several, each step in turn")
    ] = None,
    steps: int = Recipe.steps,
    images_per_step: int = Recipe.images_per_step,
    questions_per_image: int = Recipe.questions_per_image,
    rank: int = Recipe.rank,
    lora_lr: float = Recipe.lora_lr,
    projector_lr: float = Recipe.projector_lr,
    warmup: int = Recipe.warmup,
    decay_steps: int = Recipe.decay_steps,
    cooldown: int = Recipe.cooldown,
    seed: int = Recipe.seed,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 where the hardware has it")] = Recipe.precision,
    stop_after: Annotated[int | None, typer.Option(help="stop at this step; run again to go on")] = None,
    save_every: int = 50,
    eval_every: int = 50,
    eval_images: Annotated[int, typer.Option(help="held-out images of each data set")] = 16,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads, 0 leaves torch's choice")] = 0,
    workers: Annotated[int, typer.Option(help="CPU workers of one thread each, good beside other work")] = 1,
    painters: Annotated[int, typer.Option(help="processes that paint ahead, where a GPU trains; 0: none")] = 0,
) -> None:
    """Train LoRA and projector, by default on easy-VQA's colour and shape questions."""
    if threads:
        torch.set_num_threads(threads)
    seen = FEATURE_LAYERS if start is None else trained_at(start)[1]
    recipe = Recipe(
        steps=steps,
        images_per_step=images_per_step,
        questions_per_image=questions_per_image,
        rank=rank,
        lora_lr=lora_lr,
        projector_lr=projector_lr,
        warmup=warmup,
        decay_steps=decay_steps,
        cooldown=cooldown,
        seed=seed,
        data=data,
        image_size=image_size,
        precision=precision,  # type: ignore[arg-type]
        start=sha256_of(start) if start is not None else "",
        feature_layers=seen,
        plans=tuple(Plan.from_json(path).to_json() for path in plans or ()),
    )
    if precision not in get_args(Precision):
        raise typer.BadParameter(f"precision is float32 or bfloat16, not {precision!r}")
    weights = parse_mixture(data)
    model, processor = load_petite_vlm(adapter=None, image_size=image_size, feature_layers=seen)
    model.to(device)
    mixture = Mixture(model, processor, weights, images_per_step, questions_per_image, seed)
    source: Source = mixture
    if list(weights) == ["easy_vqa"]:
        source = epochs(model, processor, recipe)
    elif painters:
        source = Ahead(mixture, steps, painters)
    tested = Mixture(model, processor, weights, images_per_step, questions_per_image, seed, split="test")
    held_out = HeldOut(tested, eval_images)
    tensors = None if start is None else read_adapter(start)[0]
    trainer = Trainer(model, recipe, source, workers, tensors)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.resume(checkpoint)
        console.print(f"resumed at step {trainer.step}")

    def evaluate() -> None:
        point = {"step": float(trainer.step)}
        under = [Plan.from_json(text) for text in recipe.plans] or [Plan.identity()]
        for student, plan in zip(trainer.students, under, strict=True):
            for key, value in held_out.point(student, shuffled=trainer.step == steps).items():
                name, _, what = key.partition(" ")
                point[f"{name}{in_mode(plan)} {what}".strip()] = value
        trainer.evaluations.append(point)
        console.print({key: round(value, 3) for key, value in point.items()})

    def keep() -> None:
        trainer.save(checkpoint)
        curve = {"curve": trainer.curve, "evaluations": trainer.evaluations}
        (out / "curve.json").write_text(json.dumps(curve, indent=1) + "\n")
        plot(trainer, out / "curve.png")
        trainer.export(out / "petite_vlm.safetensors")

    last = min(steps, stop_after) if stop_after is not None else steps
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("training", total=steps, completed=trainer.step)
        while trainer.step < last:
            point = trainer.train_step()
            progress.update(bar, completed=trainer.step, description=f"loss {point['loss']:.3f}")
            if trainer.step % 10 == 0 and not console.is_terminal:
                console.print({key: round(value, 4) for key, value in point.items()})
            if trainer.step % eval_every == 0 or trainer.step == steps:
                evaluate()
            if trainer.step % save_every == 0:
                keep()
    keep()


if __name__ == "__main__":
    typer.run(main)
