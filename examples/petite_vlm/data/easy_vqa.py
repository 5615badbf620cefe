"""easy-VQA's colour and shape questions, in a fixed order: one shape on a plain 64-pixel picture.

The official split is by image: no test image appears in training. Yes/no questions are left out, because a prior over
the text alone already answers about 70% of them.
"""

from __future__ import annotations

import json
import zipfile
from functools import cache
from pathlib import Path

from PIL import Image

from examples.petite_vlm.parts import QUESTIONS, build_once, fetch

from .questions import Question, Split, Task, by_image

SHAPES = ("circle", "rectangle", "triangle")


def easy_vqa_dir() -> Path:
    """The unpacked easy-VQA data: `{train,test}/questions.json` and `{train,test}/images/<id>.png`."""

    def build(folder: Path) -> None:
        prefix = "easy_vqa/data/"
        with zipfile.ZipFile(fetch(QUESTIONS)) as wheel:
            for item in wheel.infolist():
                if item.is_dir() or not item.filename.startswith(prefix) or item.filename.endswith(".DS_Store"):
                    continue
                out = folder / item.filename.removeprefix(prefix)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(wheel.read(item))

    return build_once("easy-vqa-1", build)


def load_questions(root: Path, split: Split) -> list[Question]:
    """The wh-questions of a split, in file order."""
    rows = json.loads((root / split / "questions.json").read_text())
    return [
        Question(image, text, answer, "shape" if answer in SHAPES else "colour")
        for text, answer, image in rows
        if answer not in ("yes", "no")
    ]


def open_image(root: Path, split: Split, image: int) -> Image.Image:
    """The 64x64 picture."""
    with Image.open(root / split / "images" / f"{image}.png") as picture:
        return picture.convert("RGB")


@cache
def _groups(split: Split) -> list[list[Question]]:
    return by_image(load_questions(easy_vqa_dir(), split))


class EasyVqa:
    """The data set; pictures without such a question are left out, so numbers are not those of the files."""

    name = "easy_vqa"
    task: Task = "vqa"
    max_new_tokens = 4

    def images(self, split: Split) -> int:
        return len(_groups(split))

    def picture(self, split: Split, image: int) -> Image.Image:
        return open_image(easy_vqa_dir(), split, _groups(split)[image][0].image)

    def questions(self, split: Split, image: int) -> list[Question]:
        return [Question(image, q.text, q.answer, q.kind) for q in _groups(split)[image]]
