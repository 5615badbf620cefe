"""Held-out accuracy through stock `generate`, and the shuffled-image control.

`python -m examples.petite_vlm.evaluate` looks at easy-VQA's own test images, none of which was trained on. With
`--record` the figures are written to the json file beside the adapter.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from .data import Question, by_image, easy_vqa_dir, load_questions, open_image, shuffled_partner
from .model import ADAPTER, load_petite_vlm
from .parts import LANGUAGE, QUESTIONS, VISION, sha256_of
from .processor import PetiteProcessor

console = Console()


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    processor: PetiteProcessor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    max_new_tokens: int = 8,
) -> list[str]:
    """Greedy answers to one batch, one image a question."""
    inputs = {key: value.to(model.device) for key, value in processor.prepare(images, questions).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output, inputs["input_ids"].shape[1])


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Share of exact answers: overall, for colours, for shapes, and for every answer word."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, said in zip(questions, answers, strict=True):
        for key in ("all", question.kind, question.answer):
            right[key].append(said == question.answer)
    order = ["all", "colour", "shape", *sorted(right.keys() - {"all", "colour", "shape"})]
    return {key: round(sum(right[key]) / len(right[key]), 4) for key in order if key in right}


def main(
    adapter: Annotated[Path, typer.Option(help="the adapter file")] = ADAPTER,
    images: Annotated[int, typer.Option(help="held-out images to look at, 0 for all")] = 200,
    batch: int = 16,
    image_size: Annotated[int | None, typer.Option(help="pixels, a multiple of 14; default: as trained")] = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    workers: Annotated[int, typer.Option(help="batches in flight at a time")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of each")] = torch.get_num_threads(),
    record: Annotated[bool, typer.Option(help="write the figures to the json beside the adapter")] = False,
) -> None:
    """Accuracy on held-out images, with the right image and with another one."""
    torch.set_num_threads(threads)
    root = easy_vqa_dir()
    model, processor = load_petite_vlm(adapter, image_size=image_size)
    model.to(device)
    groups = by_image(load_questions(root, "test"))
    partner = shuffled_partner([group[0].image for group in groups])
    chosen = groups[: images or len(groups)]
    questions = [question for group in chosen for question in group]
    shown = {"images": [q.image for q in questions], "shuffled": [partner[q.image] for q in questions]}
    starts = range(0, len(questions), batch)

    def run(job: tuple[str, int]) -> list[str]:
        name, start = job
        pictures = [open_image(root, "test", number) for number in shown[name][start : start + batch]]
        return answer(model, processor, pictures, [q.text for q in questions[start : start + batch]])

    jobs = [(name, start) for name in shown for start in starts]
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        parts = list(track(pool.map(run, jobs), description="asking", total=len(jobs), console=console))
    answers = [said for part in parts for said in part]
    figures = {
        "images": score(questions, answers[: len(questions)]),
        "shuffled": score(questions, answers[len(questions) :]),
    }
    table = Table("answers", "right image", "another image", title=f"{len(questions)} questions, {len(chosen)} images")
    for key, value in figures["images"].items():
        table.add_row(key, f"{value:.1%}", f"{figures['shuffled'][key]:.1%}")
    console.print(table)
    if record:
        with safe_open(adapter, "pt") as file:
            recipe = json.loads(file.metadata()["recipe"])
        described = {
            "sha256": sha256_of(adapter),
            "bytes": adapter.stat().st_size,
            "parts": {pin.requirement: pin.sha256 for pin in (LANGUAGE, VISION, QUESTIONS)},
            "recipe": recipe,
            "held_out": {
                "split": "easy-VQA test, colour and shape questions",
                "how": "greedy, stock generate, exact match, float32",
                "image_tokens": processor.image_tokens,
                "images": len(chosen),
                "questions": len(questions),
                "accuracy": figures["images"],
                "accuracy_shuffled": figures["shuffled"],
            },
        }
        adapter.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
