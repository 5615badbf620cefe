"""easy-VQA's colour and shape questions, in a fixed order, and the shuffled-image control.

The official split is by image: no test image appears in training. Yes/no questions are left out, because a prior over
the text alone already answers about 70% of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

Split = Literal["train", "test"]
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Question:
    """One question about one image; `image` is the number of the image inside its split."""

    image: int
    text: str
    answer: str

    @property
    def kind(self) -> str:
        return "shape" if self.answer in SHAPES else "colour"


def load_questions(root: Path, split: Split) -> list[Question]:
    """The wh-questions of a split, in file order."""
    rows = json.loads((root / split / "questions.json").read_text())
    return [Question(image, text, answer) for text, answer, image in rows if answer not in ("yes", "no")]


def open_image(root: Path, split: Split, image: int) -> Image.Image:
    """The 64x64 picture."""
    with Image.open(root / split / "images" / f"{image}.png") as picture:
        return picture.convert("RGB")


def shuffled_partner(images: Sequence[int], seed: int = 0) -> dict[int, int]:
    """The control: for each image another one, to be shown in its place. What then is still right needs no looking."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    # A rotation of a random order: a permutation without fixed points.
    return {images[order[i]]: images[order[i - 1]] for i in range(len(order))}


def by_image(questions: Sequence[Question]) -> list[list[Question]]:
    """The questions grouped by image, images in ascending order, questions in file order."""
    groups: dict[int, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image, []).append(question)
    return [groups[image] for image in sorted(groups)]
