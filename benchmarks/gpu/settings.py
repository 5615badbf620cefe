"""What is measured and how: cells of the grid, and the settings that all of them share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["BATCHES", "PHASES", "TESTS", "TINY_BATCHES", "Cell", "Settings"]

PHASES = ("attention", "decode", "prefill")
BATCHES = (1, 8, 32)
TINY_BATCHES = (1, 3)


@dataclass(frozen=True)
class Cell:
    """One place of the grid; everything in it is measured in one go and compared with one another."""

    phase: str
    model: str = ""
    batch: int = 0

    @property
    def id(self) -> str:
        return f"{self.phase}/{self.model}/{self.batch}" if self.model else self.phase


TESTS = Cell("tests")
"""The tests with the marker `gpu`."""


@dataclass(frozen=True)
class Settings:
    """The same for all cells of a run, here and in the process that measures."""

    device: str = "cuda"
    tiny: bool = False
    dtype: str = "bfloat16"
    layers: int = 4
    """Decoder layers; the published models have 28 or 32."""
    steps: int = 60
    """Timed decode steps of a contender."""
    prompts: int = 10
    """Timed prompts of a contender."""
    codegen: bool = True
    """False: graphs are captured and rewritten, and run without Inductor. For rehearsals."""
    extra: tuple[str, ...] = ()
    """Modules that add contenders of their own when they are imported."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "extra": list(self.extra)}
