"""Train the adapter: `python -m examples.petite_vlm.train --help`. Stops and resumes anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .data import Split, by_image, load_questions, shuffled_partner
from .features import image_features
from .model import load_petite_vlm
from .packing import Encoded, encode_question
from .parts import easy_vqa_dir
from .processor import PetiteProcessor
from .trainer import Recipe, Trainer, teacher_forced_accuracy

console = Console()


def encode_split(
    processor: PetiteProcessor, root: Path, split: Split, image_token_id: int
) -> tuple[list[int], list[list[Encoded]]]:
    """The shared prefix and the encoded questions of a split, grouped by image."""
    prefix: list[int] = []
    groups: list[list[Encoded]] = []
    for group in by_image(load_questions(root, split)):
        encoded = [encode_question(processor, question, image_token_id) for question in group]
        prefix = encoded[0][0]
        groups.append([item for _, item in encoded])
    return prefix, groups


def plot(trainer: Trainer, path: Path) -> None:
    """Loss, training accuracy and held-out accuracy against the step."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps = [p["step"] for p in trainer.curve]
    left.semilogy(steps, [p["loss"] for p in trainer.curve], lw=0.8)
    left.set(xlabel="step", ylabel="loss on answer tokens")
    right.plot(steps, [p["accuracy"] for p in trainer.curve], lw=0.4, alpha=0.5, label="training batch")
    seen = [e["step"] for e in trainer.evaluations]
    right.plot(seen, [e["held_out"] for e in trainer.evaluations], "o-", label="held-out images")
    right.plot(seen, [e["shuffled"] for e in trainer.evaluations], "s--", label="images shuffled")
    right.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="folder for checkpoint, curve and adapter")] = Path("out/petite_vlm"),
    steps: int = Recipe.steps,
    images_per_step: int = Recipe.images_per_step,
    rank: int = Recipe.rank,
    lora_lr: float = Recipe.lora_lr,
    projector_lr: float = Recipe.projector_lr,
    seed: int = Recipe.seed,
    stop_after: Annotated[int | None, typer.Option(help="stop at this step; run again to go on")] = None,
    save_every: int = 50,
    eval_every: int = 50,
    eval_images: Annotated[int, typer.Option(help="held-out images looked at during training")] = 64,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads, 0 leaves torch's choice")] = 0,
    workers: Annotated[int, typer.Option(help="CPU workers of one thread each, good beside other work")] = 1,
) -> None:
    """Train LoRA and projector on easy-VQA's colour and shape questions."""
    if threads:
        torch.set_num_threads(threads)
    recipe = Recipe(
        steps=steps,
        images_per_step=images_per_step,
        rank=rank,
        lora_lr=lora_lr,
        projector_lr=projector_lr,
        seed=seed,
    )
    root = easy_vqa_dir()
    model, processor = load_petite_vlm(adapter=None)
    model.to(device)
    features = {split: image_features(model, root, split, processor.image_size) for split in ("train", "test")}
    token = model.config.image_token_id
    prefix, groups = encode_split(processor, root, "train", token)
    _, held_out = encode_split(processor, root, "test", token)
    partner = shuffled_partner([group[0].question.image for group in held_out])
    held_out = held_out[:eval_images]

    trainer = Trainer(model, recipe, groups, features["train"], prefix, workers)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.resume(checkpoint)
        console.print(f"resumed at step {trainer.step}")

    def evaluate() -> None:
        point: dict[str, float] = {"step": trainer.step}
        point["held_out"] = teacher_forced_accuracy(model, held_out, features["test"], prefix)
        point["shuffled"] = teacher_forced_accuracy(model, held_out, features["test"], prefix, images=partner)
        trainer.evaluations.append(point)
        console.print(f"step {trainer.step}: held-out {point['held_out']:.1%}, shuffled {point['shuffled']:.1%}")

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
