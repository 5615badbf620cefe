"""Where a trainer's rows come from: one data set in epochs, or several mixed for ever."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from .data import DATASETS, Split
from .features import encode
from .packing import Encoded, encode_question
from .processor import PetiteProcessor, normalised, to_bytes


class Source(Protocol):
    """Rows by step, a pure function of the step: resuming needs no state."""

    prefix: Sequence[int]
    """What every row begins with: up to the last image token."""

    def rows_of(self, step: int) -> list[Sequence[Encoded]]:
        """The rows of a step; the questions of a row share a picture."""
        ...

    def features_of(self, rows: Sequence[Sequence[Encoded]]) -> torch.Tensor:
        """``[R, image tokens, width]`` float32: what the vision encoder sees in the pictures of some rows."""
        ...

    def sample(self) -> torch.Tensor:
        """``[N, image tokens, width]``: features like those that will come."""
        ...


class Epochs:
    """One data set, every picture once an epoch; features are at hand, indexed by image number."""

    def __init__(
        self,
        groups: Sequence[Sequence[Encoded]],
        features: np.ndarray,
        prefix: Sequence[int],
        images_per_step: int,
        questions_per_image: int,
        seed: int,
    ) -> None:
        self.prefix, self.features, self.seed = prefix, features, seed
        self.groups = [group for group in groups if len(group) > 1]
        self.per_step, self.cap = images_per_step, questions_per_image

    def rows_of(self, step: int) -> list[Sequence[Encoded]]:
        rows: list[Sequence[Encoded]] = []
        for number in range(step * self.per_step, (step + 1) * self.per_step):
            epoch, place = divmod(number, len(self.groups))
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            group = self.groups[int(torch.randperm(len(self.groups), generator=generator)[place])]
            # Images with more questions than fit show another window of them in every epoch.
            shift = epoch % len(group)
            rows.append((*group[shift:], *group[:shift])[: self.cap])
        return rows

    def features_of(self, rows: Sequence[Sequence[Encoded]]) -> torch.Tensor:
        images = [row[0].question.image for row in rows]
        return torch.from_numpy(self.features[images].astype(np.float32))

    def sample(self) -> torch.Tensor:
        return torch.from_numpy(self.features[:256].astype(np.float32))


def parse_mixture(data: str) -> dict[str, float]:
    """``"composites:3,words:2"`` as data sets and weights.

    Raises:
        ValueError: a data set is not known, or a weight is no positive number.
    """
    weights: dict[str, float] = {}
    for item in data.split(","):
        name, _, weight = item.strip().partition(":")
        if name not in DATASETS:
            raise ValueError(f"{name!r} is no data set: choose among {', '.join(DATASETS)}")
        try:
            weights[name] = float(weight or "1")
        except ValueError:
            weights[name] = 0.0
        if not weights[name] > 0:
            raise ValueError(f"the weight of {name} must be a positive number, got {weight!r}")
    return weights


class Drawn:
    """Several data sets by weight: what is asked about which picture at which step, and the pictures themselves.

    Pictures are made when they are needed, so none is seen twice where a data set has enough of them. There is no model
    in it, so another process may do its work (`ahead`).
    """

    def __init__(
        self,
        processor: PetiteProcessor,
        image_token_id: int,
        weights: Mapping[str, float],
        images_per_step: int,
        questions_per_image: int,
        seed: int,
        split: Split = "train",
    ) -> None:
        self.processor, self.token, self.split, self.seed = processor, image_token_id, split, seed
        self.weights = dict(weights)
        self.per_step, self.cap = images_per_step, questions_per_image
        self.prefix = self.row(next(iter(weights)), 0)[0]

    def row(self, name: str, image: int) -> tuple[list[int], tuple[Encoded, ...]]:
        """The shared prefix, and everything that is asked about a picture."""
        asked = [replace(q, dataset=name) for q in DATASETS[name].questions(self.split, image)]
        encoded = [encode_question(self.processor, question, self.token) for question in asked]
        return encoded[0][0], tuple(item for _, item in encoded)

    def rows_of(self, step: int) -> list[Sequence[Encoded]]:
        rows: list[Sequence[Encoded]] = []
        for number in range(step * self.per_step, (step + 1) * self.per_step):
            draw = random.Random(f"{self.seed}/{number}")
            name = draw.choices(tuple(self.weights), tuple(self.weights.values()))[0]
            items = self.row(name, draw.randrange(DATASETS[name].images(self.split)))[1]
            rows.append(draw.sample(items, min(self.cap, len(items))))
        return rows

    def paint(self, picture: tuple[str, int]) -> Image.Image:
        """A picture, by data set and number."""
        return DATASETS[picture[0]].picture(self.split, picture[1])


class Mixture(Drawn):
    """What is drawn, seen by the vision encoder of a model."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: PetiteProcessor,
        weights: Mapping[str, float],
        images_per_step: int,
        questions_per_image: int,
        seed: int,
        split: Split = "train",
    ) -> None:
        token = model.config.image_token_id
        super().__init__(processor, token, weights, images_per_step, questions_per_image, seed, split)
        self.model = model
        self.painters = ThreadPoolExecutor(os.cpu_count())

    def features_of(self, rows: Sequence[Sequence[Encoded]]) -> torch.Tensor:
        return self.features([picture_of(row) for row in rows])

    def features(self, pictures: Sequence[tuple[str, int]]) -> torch.Tensor:
        """``[N, image tokens, width]`` float32 of pictures, each by data set and number."""
        return self.seen(to_bytes(list(self.painters.map(self.paint, pictures)), self.processor.image_size))

    @torch.no_grad()
    def seen(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[N, image tokens, width]`` float32 of pictures ``[N, 3, S, S]`` uint8."""
        return encode(self.model, normalised(pixels.to(self.model.device)).to(self.model.dtype)).float()

    def sample(self) -> torch.Tensor:
        each = max(1, 48 // len(self.weights))
        return torch.cat([self.features([(name, image) for image in range(each)]) for name in self.weights])


def picture_of(row: Sequence[Encoded]) -> tuple[str, int]:
    """Data set and number of the picture that a row asks about."""
    return row[0].question.dataset, row[0].question.image
