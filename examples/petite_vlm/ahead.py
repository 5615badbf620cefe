"""Rows and pictures of the steps to come, made by other processes: a GPU trains faster than one process paints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from .packing import Encoded
from .processor import to_bytes
from .sources import Drawn, Mixture, picture_of

if TYPE_CHECKING:
    Steps = Dataset[tuple[list[Sequence[Encoded]], torch.Tensor]]
else:
    Steps = Dataset


class _Painted(Steps):
    """By step: its rows, and their pictures as bytes."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn

    def __getitem__(self, step: int) -> tuple[list[Sequence[Encoded]], torch.Tensor]:
        rows = self.drawn.rows_of(step)
        pictures = [self.drawn.paint(picture_of(row)) for row in rows]
        return rows, to_bytes(pictures, self.drawn.processor.image_size)


class Ahead:
    """A `Mixture` whose steps up to ``steps`` are prepared by ``processes``; its rows and features are the same.

    Steps are expected in order; asking for another one starts anew from there.
    """

    def __init__(self, mixture: Mixture, steps: int, processes: int) -> None:
        self.mixture, self.steps, self.processes = mixture, steps, processes
        self.prefix = mixture.prefix
        self._expected: int | None = None
        self._coming: Iterator[tuple[list[Sequence[Encoded]], torch.Tensor]] = iter(())
        self._pixels: dict[tuple[str, int], torch.Tensor] = {}

    def rows_of(self, step: int) -> list[Sequence[Encoded]]:
        if step != self._expected:
            m = self.mixture
            drawn = Drawn(m.processor, m.token, m.weights, m.per_step, m.cap, m.seed, m.split)
            # Not forked: this process holds threads, and perhaps a GPU.
            loader = DataLoader(
                _Painted(drawn),
                batch_size=None,
                sampler=range(step, self.steps),
                num_workers=self.processes,
                prefetch_factor=4,
                multiprocessing_context="spawn",
            )
            self._coming = iter(loader)
        rows, pixels = next(self._coming)
        self._pixels = dict(zip(map(picture_of, rows), pixels, strict=True))
        self._expected = step + 1
        return rows

    def features_of(self, rows: Sequence[Sequence[Encoded]]) -> torch.Tensor:
        return self.mixture.seen(torch.stack([self._pixels[picture_of(row)] for row in rows]))

    def sample(self) -> torch.Tensor:
        return self.mixture.sample()
