"""Dense prompts that many contenders share: computed once a batch, with what every key was attended to."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.oracle._interface import attention_weights, in_charge, weighted

__all__ = ["LATE", "Attended", "Prompts", "stock_cache"]

PROMPT_ONLY = ("pixel_values",)
"""Inputs that a step behind the prompt does without."""
LATE = 8
"""Rows of a prompt that are asked what they look at, where it is not one or all: those behind the picture."""


def stock_cache(model: Any) -> DynamicCache:
    """An empty cache such as `generate` makes."""
    return DynamicCache(config=model.config.get_text_config())


@dataclass(frozen=True)
class Attended:
    """What the keys of a prompt were given in one layer, averaged over heads: float32 ``[batch, keys]``."""

    by_last: Tensor
    """By the last query; 0 for padding alone."""
    by_late: Tensor
    """By the last `LATE` queries, summed."""
    by_all: Tensor
    """By all queries, summed."""


class Prompts:
    """Prompts of one model by their inputs; each holds its cache, so drop this when the batches are done."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        """Where the decoder layers stand."""
        self._known: dict[str, tuple[dict[int, Attended], DynamicCache]] = {}

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.prefix))  # type: ignore[arg-type]

    def of(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[int, Attended], dict[str, Any]]:
        """What the keys were attended to, by layer, and inputs that begin behind the prompt but for its last token."""
        name = hashlib.sha256()
        for key in sorted(inputs):
            name.update(key.encode() + inputs[key].contiguous().view(torch.uint8).numpy().tobytes())
        if name.hexdigest() not in self._known:
            self._known[name.hexdigest()] = self._computed(model, inputs)
        attended, cache = self._known[name.hexdigest()]
        behind = {key: value for key, value in inputs.items() if key not in PROMPT_ONLY}
        return attended, behind | {"past_key_values": copy.deepcopy(cache)}

    def _computed(self, model: Any, inputs: Mapping[str, Any]) -> tuple[dict[int, Attended], DynamicCache]:
        cache, watch = stock_cache(model), _Watch({})
        with in_charge(model, self.layers(model), watch):
            model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
        cache.crop(-1)  # `generate` needs a token to go on from
        return watch.attended, cache


@dataclass(frozen=True)
class _Watch:
    """Dense attention that notes what keys are given."""

    attended: dict[int, Attended]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        weights = attention_weights(q, k, mask, scale, causal)
        rows = weights.mean(1)
        self.attended[layer] = Attended(rows[:, -1].clone(), rows[:, -LATE:].sum(1), rows.sum(1))
        return weighted(weights, v)
