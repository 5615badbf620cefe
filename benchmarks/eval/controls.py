"""Controls: what somebody would do who does not look, or looks once, or at the wrong thing, with as many keys.

Each runs eagerly through the attention interface, like the oracle of the tests, and leaves the prompt dense: it chooses
at the end of the prompt which keys the decode steps may read. With N visual keys and a share s, a control that tells
images from text keeps all text and `int(s * N)` visual keys; one that does not keeps as many keys in all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avl_fx import Contender
from tests.oracle._interface import attention_weights, in_charge

__all__ = ["CONTROLS", "control", "down_sampled", "other_pictures"]

SINKS = 4
"""First tokens that a window always keeps (StreamingLLM, arXiv 2309.17453)."""
DENSE_LAYERS = 2
"""FastV (arXiv 2403.06764) chooses by what the layer behind these attends to, and leaves these alone."""


@dataclass(frozen=True)
class Prompt:
    """What a choice may look at."""

    layer: int
    weights: Tensor
    """Softmax rows of the prompt, float32 ``[batch, heads, queries, keys]``."""
    visual: Tensor
    """bool ``[batch, keys]``"""
    visible: Tensor
    """Keys that are no padding, bool ``[batch, keys]``."""
    share: float
    seed: int
    chosen: dict[int, Tensor]
    """What earlier layers keep."""

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
    row_scores = prompt.weights[:, :, -1].mean(1)

    def pick(row: int, positions: Tensor, count: int) -> Tensor:
        return positions[row_scores[row, positions].topk(count).indices]

    return prompt.text_and(pick)


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
    summed = prompt.weights.mean(1).sum(1)
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
    "window": window,
    "H2O": heavy_hitters,
}
"""Every choice of keys, by the name that tables use."""


@dataclass
class _Controlled:
    """Attention of every decoder layer under one choice."""

    choice: Choice
    visual: Tensor
    share: float
    seed: int
    keep: dict[int, Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        if q.shape[2] > 1:
            weights = attention_weights(q, k, mask, scale, causal)
            visual = F.pad(self.visual, (0, k.shape[2] - self.visual.shape[1]))
            visible = weights[:, :, -1].sum(1) > 0  # a key that the last query may not see is padding
            prompt = Prompt(layer, weights, visual, visible, self.share, self.seed, self.keep)
            self.keep[layer] = self.choice(prompt)
        else:
            keep = self.keep[layer]
            readable = F.pad(keep, (0, k.shape[2] - keep.shape[1]), value=True)[:, None, None]
            hidden = torch.zeros(readable.shape, dtype=q.dtype).masked_fill(~readable, torch.finfo(q.dtype).min)
            if mask is not None:
                if mask.dtype == torch.bool:
                    mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
                hidden = torch.minimum(hidden, mask)
            weights = attention_weights(q, k, hidden, scale)
        return torch.matmul(weights.to(q.dtype), v.repeat_interleave(q.shape[1] // k.shape[1], dim=1))


def control(name: str, share: float, prefix: str, seed: int = 0) -> Contender:
    """One of `CONTROLS` as a contender, for a transformers model whose decoder layers stand at ``prefix``."""
    around = functools.partial(_controlled, choice=CONTROLS[name], share=share, prefix=prefix, seed=seed)
    return Contender(f"control {name} {share:g} {seed}", around=around, budget=share)


@contextlib.contextmanager
def _controlled(
    model: nn.Module, inputs: Mapping[str, Any], *, choice: Choice, share: float, prefix: str, seed: int
) -> Iterator[Mapping[str, Any]]:
    visual = inputs["input_ids"] == model.config.image_token_id  # type: ignore[union-attr]
    layers = list(model.get_submodule(prefix))  # type: ignore[arg-type]
    with in_charge(model, layers, _Controlled(choice, visual, share, seed)):
        yield inputs


def down_sampled(share: float) -> Contender:
    """A smaller picture: of a square grid of patches so many fewer that at most ``share`` of its tokens are left."""
    return Contender(f"down-sampled {share:g}", around=functools.partial(_smaller, share=share), budget=share)


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
    return Contender("other pictures", around=_rolled)


@contextlib.contextmanager
def _rolled(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield {**inputs, "pixel_values": inputs["pixel_values"].roll(1, 0)}
