"""Controls: what somebody would do who does not look, or looks once, or at the wrong thing, with as many keys.

Each runs eagerly through the attention interface, like the oracle of the tests, and leaves the prompt dense: it chooses
at the end of the prompt which keys the decode steps may read. With N visual keys and a share s, a control that tells
images from text keeps all text and `int(s * N)` visual keys; one that does not keeps as many keys in all. The dense
prompt is the same for all of them, so it is computed once for each batch (`prompts.py`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avl_fx import Contender
from benchmarks.eval.prompts import Attended, Prompts, stock_cache
from tests.oracle._interface import attend, in_charge

__all__ = ["CONTROLS", "control", "down_sampled", "other_pictures"]

SINKS = 4
"""First tokens that a window always keeps (StreamingLLM, arXiv 2309.17453)."""
DENSE_LAYERS = 2
"""FastV (arXiv 2403.06764) chooses by what the layer behind these attends to, and leaves these alone."""


@dataclass(frozen=True)
class Prompt:
    """What a choice may look at."""

    layer: int
    attended: Attended
    visual: Tensor
    """bool ``[batch, keys]``"""
    share: float
    seed: int
    chosen: dict[int, Tensor]
    """What earlier layers keep."""

    @property
    def visible(self) -> Tensor:
        """Keys that are no padding, bool ``[batch, keys]``: the last query sees them."""
        return self.attended.by_last > 0

    def visual_budget(self, row: int) -> int:
        return int(self.share * int(self.visual[row].sum()))

    def budget(self, row: int) -> int:
        """Keys in all."""
        return int((self.visible[row] & ~self.visual[row]).sum()) + self.visual_budget(row)

    def text_and(self, pick: Callable[[int, Tensor, int], Tensor]) -> Tensor:
        """Text, and of the visual keys of each row those that ``pick(row, positions, how many)`` names."""
        keep = self.visible & ~self.visual
        for row in range(len(keep)):
            keep[row, pick(row, self.visual[row].nonzero().flatten(), self.visual_budget(row))] = True
        return keep

    def best(self, scores: Tensor) -> Tensor:
        """Text, and the visual keys with the highest of these scores, ``[batch, keys]``."""
        return self.text_and(lambda row, positions, count: positions[scores[row, positions].topk(count).indices])


Choice = Callable[[Prompt], Tensor]
"""Keys that decode steps may read, bool ``[batch, keys]``."""


def random_core(prompt: Prompt) -> Tensor:
    """Visual keys drawn at random, anew for each layer and row."""

    def pick(row: int, positions: Tensor, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(prompt.seed * 1_000_003 + prompt.layer * 1009 + row)
        return positions[torch.randperm(len(positions), generator=generator)[:count]]

    return prompt.text_and(pick)


def strided(prompt: Prompt) -> Tensor:
    """Every n-th visual key: a coarser grid of the same picture."""

    def pick(row: int, positions: Tensor, count: int) -> Tensor:
        return positions[torch.linspace(0, len(positions) - 1, count).round().long()] if count else positions[:0]

    return prompt.text_and(pick)


def fastv(prompt: Prompt) -> Tensor:
    """One choice for all layers, never refreshed: what an early layer's last row looks at."""
    if prompt.layer < DENSE_LAYERS:
        return prompt.visible.clone()
    if prompt.layer > DENSE_LAYERS:
        return prompt.chosen[DENSE_LAYERS].clone()
    return snap(prompt)


def snap(prompt: Prompt) -> Tensor:
    """What this layer's last row looks at, never refreshed."""
    return prompt.best(prompt.attended.by_last)


def snap_late(prompt: Prompt) -> Tensor:
    """What this layer's last rows look at, never refreshed (SnapKV, arXiv 2404.14469, for all heads and not pooled)."""
    return prompt.best(prompt.attended.by_late)


def window(prompt: Prompt) -> Tensor:
    """The first tokens and the latest, images or not (StreamingLLM)."""
    keep = torch.zeros_like(prompt.visible)
    for row in range(len(keep)):
        real = prompt.visible[row].nonzero().flatten()
        budget = prompt.budget(row)
        keep[row, real[:SINKS]] = True
        keep[row, real[max(0, len(real) - max(0, budget - SINKS)) :]] = True
    return keep


def heavy_hitters(prompt: Prompt) -> Tensor:
    """The keys that the whole prompt attended to most, images or not, and the latest half (H2O, arXiv 2306.14048)."""
    keep = torch.zeros_like(prompt.visible)
    summed = prompt.attended.by_all
    for row in range(len(keep)):
        real = prompt.visible[row].nonzero().flatten()
        budget = prompt.budget(row)
        recent = real[len(real) - budget // 2 :]
        rest = real[: len(real) - len(recent)]
        keep[row, recent] = True
        keep[row, rest[summed[row, rest].topk(min(len(rest), budget - len(recent))).indices]] = True
    return keep


CONTROLS: dict[str, Choice] = {
    "random": random_core,
    "strided": strided,
    "FastV-like": fastv,
    "no refresh": snap,
    "SnapKV-like": snap_late,
    "window": window,
    "H2O": heavy_hitters,
}
"""Every choice of keys, by the name that tables use."""


@dataclass(frozen=True)
class Kept:
    """Attention of every decoder layer behind a prompt, over the keys of it that were kept and all that came since."""

    keep: Mapping[int, Tensor]
    """By layer, bool ``[batch, keys of the prompt]``."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        keep = self.keep[layer]
        if k.shape[2] == keep.shape[1]:  # the last token of the prompt, which is dense
            return attend(q, k, v, mask, scale, causal)
        readable = F.pad(keep, (0, k.shape[2] - keep.shape[1]), value=True)[:, None, None]
        if mask is None or mask.dtype == torch.bool:
            seen = readable if mask is None else readable & mask
        else:
            seen = mask.masked_fill(~readable, torch.finfo(mask.dtype).min)
        return attend(q, k, v, seen, scale)


def control(name: str, share: float, prompts: Prompts, seed: int = 0) -> Contender:
    """One of `CONTROLS` as a contender, for the model whose dense prompts these are."""
    around = functools.partial(_controlled, choice=CONTROLS[name], share=share, prompts=prompts, seed=seed)
    return Contender(f"control {name} {share:g} {seed}", around=around, budget=share)


@contextlib.contextmanager
def _controlled(
    model: nn.Module, inputs: Mapping[str, Any], *, choice: Choice, share: float, prompts: Prompts, seed: int
) -> Iterator[Mapping[str, Any]]:
    visual = inputs["input_ids"] == model.config.image_token_id  # type: ignore[union-attr]
    attended, behind = prompts.of(model, inputs)
    keep: dict[int, Tensor] = {}
    for layer, seen in attended.items():
        keep[layer] = choice(Prompt(layer, seen, visual, share, seed, keep))
    with in_charge(model, prompts.layers(model), Kept(keep)):
        yield behind


def down_sampled(share: float) -> Contender:
    """A smaller picture: of a square grid of patches so many fewer that at most ``share`` of its tokens are left."""
    around = functools.partial(_smaller, share=share)
    return Contender(f"down-sampled {share:g}", around=around, cache=stock_cache, budget=share)


@contextlib.contextmanager
def _smaller(model: nn.Module, inputs: Mapping[str, Any], *, share: float) -> Iterator[Mapping[str, Any]]:
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    patch: int = model.config.vision_config.patch_size  # type: ignore[union-attr]
    side = pixels.shape[-1] // patch
    smaller = max(1, int((share * side * side) ** 0.5))
    shrunk = F.interpolate(pixels, size=(smaller * patch,) * 2, mode="bicubic", antialias=True, align_corners=False)
    visual = ids == model.config.image_token_id  # type: ignore[union-attr]
    # Every row holds one picture: the first of its tokens go, so that all rows stay equally long.
    gone = visual & (visual.cumsum(1) <= side * side - smaller * smaller)
    kept = {name: inputs[name][~gone].view(len(ids), -1) for name in ("input_ids", "attention_mask")}
    yield {**inputs, **kept, "pixel_values": shrunk}


def other_pictures() -> Contender:
    """The floor: every question with the next row's picture."""
    return Contender("other pictures", around=_rolled, cache=stock_cache)


@contextlib.contextmanager
def _rolled(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield {**inputs, "pixel_values": inputs["pixel_values"].roll(1, 0)}
