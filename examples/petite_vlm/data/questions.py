"""What every data set speaks of: questions about numbered pictures, in two splits that share no picture."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from PIL import Image

Split = Literal["train", "test"]
Task = Literal["vqa", "caption", "ocr"]


@dataclass(frozen=True)
class Question:
    """One question about one picture; `image` is the number of the picture inside its split."""

    image: int
    text: str
    answer: str
    kind: str = ""
    """What it asks for, to tell apart in tables."""
    dataset: str = ""
    """Whose picture it is, where several data sets are mixed."""


class Dataset(Protocol):
    """Pictures by number, and what is asked about each. The same on every machine and in every run."""

    name: str
    task: Task
    max_new_tokens: int
    """That no answer exceeds, its end included."""

    def images(self, split: Split) -> int:
        """How many pictures the split has."""
        ...

    def picture(self, split: Split, image: int) -> Image.Image:
        """The picture, RGB; any size."""
        ...

    def questions(self, split: Split, image: int) -> list[Question]:
        """All that is asked about it; never empty."""
        ...


def seeded(name: str, split: Split, image: int) -> random.Random:
    """The source of everything that is drawn for one picture: no picture depends on another, or on their order."""
    return random.Random(f"{name}/{split}/{image}")


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
