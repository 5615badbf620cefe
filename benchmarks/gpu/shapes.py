"""The models that are measured: their published shapes, weights drawn at random on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks._models import llava, qwen

__all__ = ["SHAPES", "TINY", "Shape", "shape"]


@dataclass(frozen=True)
class Shape:
    """One model. A prompt is a run of visual tokens between two halves of `benchmarks._decoding.TEXT`."""

    name: str
    family: str
    """``llava`` or ``qwen``: which class of transformers."""
    layers: int
    """Of the published model; how many are run is an option."""
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    visual: int
    images: int = 1
    """Equal squares that the visual tokens come from."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def make(self, layers: int, dtype: torch.dtype, device: str) -> Any:
        """The model with ``layers`` decoder layers. Its weights vary so that activations do at any width."""
        sizes = (layers, self.hidden, self.heads, self.kv_heads, self.visual, dtype)
        more: dict[str, Any] = {"intermediate": self.intermediate, "vocabulary": self.vocabulary, "device": device}
        more["spread"] = 1.28 * self.hidden**-0.5  # 0.02 at 4096, as transformers has it
        return llava(*sizes, images=self.images, **more) if self.family == "llava" else qwen(*sizes, **more)


def _table(*shapes: Shape) -> dict[str, Shape]:
    return {each.name: each for each in shapes}


SHAPES = _table(
    Shape("llava-1.5-7b", "llava", 32, 4096, 32, 32, 11008, 32064, visual=576),
    # Five tiles of 576: what its paper counts, without the tokens that end a row of tiles.
    Shape("llava-next-7b", "llava", 32, 4096, 32, 32, 11008, 32064, visual=2880, images=5),
    # As many visual tokens as its model card recommends at most.
    Shape("qwen2.5-vl-7b", "qwen", 28, 3584, 28, 4, 18944, 152064, visual=1280),
)
TINY = _table(
    Shape("tiny-llava", "llava", 2, 64, 4, 4, 96, 256, visual=64),
    Shape("tiny-llava-next", "llava", 2, 64, 4, 4, 96, 256, visual=80, images=5),
    Shape("tiny-qwen2.5-vl", "qwen", 2, 96, 6, 2, 128, 256, visual=70),
)
"""For a rehearsal on a CPU."""


def shape(name: str) -> Shape:
    """The shape called ``name``."""
    return {**SHAPES, **TINY}[name]
