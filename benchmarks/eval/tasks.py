"""Questions of the petite model's data sets, as evaluation tasks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from avl_fx import EvaluationBatch, EvaluationTask
from benchmarks.eval.prompts import PROMPT_ONLY
from examples.petite_vlm.data import DATASETS, Question
from examples.petite_vlm.processor import PetiteProcessor

__all__ = ["METRIC_OF", "task_of"]

METRIC_OF = {
    "easy_vqa": "exact",
    "composites": "exact",
    "captions": "rouge_l",
    "scenes": "clauses",
    "words": "anls",
    "documents": "exact",
}


class _Batches(Sequence[EvaluationBatch]):
    """Batches that are made when they are asked for: pictures are drawn then, and dropped afterwards."""

    def __init__(self, name: str, processor: PetiteProcessor, images: int, size: int) -> None:
        self.dataset, self.processor = DATASETS[name], processor
        asked = [question for image in range(images) for question in self.dataset.questions("test", image)]
        # Each picture in turn: neighbours in a batch ask about different ones, which the control needs.
        asked = [asked[place] for place in _spread(asked)]
        self.batches: list[list[Question]] = [asked[start : start + size] for start in range(0, len(asked), size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: Any) -> Any:
        asked = self.batches[number]
        pictures = [self.dataset.picture("test", question.image) for question in asked]
        inputs = self.processor.prepare(pictures, [question.text for question in asked])
        return EvaluationBatch(
            inputs, [question.answer for question in asked], [str(question.image) for question in asked]
        )


def _spread(asked: list[Question]) -> list[int]:
    """Places, one question of every picture, then another one of each; not of the same kind for all pictures."""
    places: dict[int, list[int]] = {}
    for place, question in enumerate(asked):
        places.setdefault(question.image, []).append(place)
    turns = []
    for image, own in places.items():
        turns += [((turn - image) % len(own), image, place) for turn, place in enumerate(own)]
    return [place for _, _, place in sorted(turns)]


def task_of(name: str, processor: PetiteProcessor, images: int, batch: int = 16) -> EvaluationTask:
    """The held-out questions about the first ``images`` pictures of a data set."""
    images = min(images, DATASETS[name].images("test"))
    decode = functools.partial(processor.tokenizer.batch_decode, skip_special_tokens=True)
    return EvaluationTask(
        _Batches(name, processor, images, batch),
        decode,
        metric=METRIC_OF[name],
        max_new_tokens=DATASETS[name].max_new_tokens,
        name=name,
        prompt_only=PROMPT_ONLY,
    )
