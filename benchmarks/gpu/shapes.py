"""The models that are measured: their published shapes, weights drawn at random on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks._models import llava, qwen
from benchmarks.gpu.settings import PHASES

__all__ = ["SHAPES", "TINY", "Shape", "shape"]


@dataclass(frozen=True)
class Shape:
    """One model. A prompt is a run of visual tokens between two halves of `benchmarks._decoding.TEXT`."""

    name: str
    family: str
    """``llava`` or ``qwen``: which class of transformers; ``latent``: a LLaVA whose decoder is DeepSeek-V3's."""
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
    rank: int = 0
    """Latents of a token, where all heads share them."""
    phases: tuple[str, ...] = PHASES

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def make(self, layers: int, dtype: torch.dtype, device: str) -> Any:
        """The model with ``layers`` decoder layers. Its weights vary so that activations do at any width."""
        sizes = (layers, self.hidden, self.heads, self.kv_heads, self.visual, dtype)
        more: dict[str, Any] = {"intermediate": self.intermediate, "vocabulary": self.vocabulary, "device": device}
        more["spread"] = 1.28 * self.hidden**-0.5  # 0.02 at 4096, as transformers has it
        if self.family == "qwen":
            return qwen(*sizes, **more)
        return llava(*sizes, images=self.images, rank=self.rank, **more)


def _table(*shapes: Shape) -> dict[str, Shape]:
    return {each.name: each for each in shapes}


SHAPES = _table(
    Shape("llava-1.5-7b", "llava", 32, 4096, 32, 32, 11008, 32064, visual=576),
    # Five tiles of 576: what its paper counts, without the tokens that end a row of tiles.
    Shape("llava-next-7b", "llava", 32, 4096, 32, 32, 11008, 32064, visual=2880, images=5),
    # As many visual tokens as its model card recommends at most.
    Shape("qwen2.5-vl-7b", "qwen", 28, 3584, 28, 4, 18944, 152064, visual=1280),
    # The decoder of DeepSeek-VL2-Small without its experts, under DeepSeek-V3's class.
    Shape(
        "deepseek-vl2-small",
        *("latent", 27, 2048, 16, 16, 10944, 102400),
        visual=2880,
        images=5,
        rank=512,
        phases=("decode",),
    ),
)
TINY = _table(
    Shape("tiny-llava", "llava", 2, 64, 4, 4, 96, 256, visual=64),
    Shape("tiny-llava-next", "llava", 2, 64, 4, 4, 96, 256, visual=80, images=5),
    Shape("tiny-qwen2.5-vl", "qwen", 2, 96, 6, 2, 128, 256, visual=70),
    Shape("tiny-deepseek", "latent", 2, 64, 4, 4, 96, 256, visual=64, rank=32, phases=("decode",)),
)
"""For a rehearsal on a CPU."""


def shape(name: str) -> Shape:
    """The shape called ``name``."""
    return {**SHAPES, **TINY}[name]
