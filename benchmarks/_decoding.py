"""What the benchmarks of whole decode steps share: the plan, caches filled at random, and what a step has to read.

What a step costs does not depend on what is in its cache (but for the rows that refreshes move, which random keys make
many), so no prompt is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from avl_fx import Plan

__all__ = ["PLAN", "REFRESH", "TEXT", "filled", "mean_share", "periods", "read_bytes", "visual_positions"]

TEXT = 32
"""Text tokens of a prompt: half of them before its visual tokens, half behind."""
REFRESH = 3
PLAN = Plan.avl(core=0.3, secondary=0.5, refresh=REFRESH, text=None)
"""What *partitioned* means."""


def visual_positions(batch: int, visual: int, device: str | torch.device = "cpu") -> Tensor:
    """bool ``[batch, prompt]``"""
    flags = torch.zeros(batch, visual + TEXT, dtype=torch.bool, device=device)
    flags[:, TEXT // 2 : TEXT // 2 + visual] = True
    return flags


def filled(
    model: Any,
    kind: str,
    batch: int,
    visual: int,
    steps: int,
    rows: Sequence[int] | None = None,
    drawn: torch.dtype | None = None,
) -> Any:
    """A cache of a prompt of ``visual`` image tokens between two halves of `TEXT`, on the model's device.

    Args:
        kind: ``dynamic`` or ``static``.
        steps: tokens that a static cache has room for behind the prompt.
        rows: keep these of the ``batch`` rows alone; they hold what they hold in the whole.
        drawn: the dtype in which numbers are drawn before they are cast to the model's; by default that.
    """
    text, length = model.config.get_text_config(), visual + TEXT
    cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=length + steps)
    generator = torch.Generator(model.device).manual_seed(1)
    for layer in range(text.num_hidden_layers):
        key_and_value = []
        for heads, dim in _stored(text):
            shape = (batch, heads, length, dim)
            whole = torch.randn(shape, generator=generator, device=model.device, dtype=drawn or model.dtype)
            key_and_value.append((whole if rows is None else whole[list(rows)]).to(model.dtype))
        cache.update(*key_and_value, layer)
    return cache


def _stored(text: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads and width of both tensors that a layer's cache holds: keys and values, or latents and rotated keys."""
    rank = getattr(text, "kv_lora_rank", None)
    if rank:
        return (1, rank), (1, text.qk_rope_head_dim)
    key = (text.num_key_value_heads, text.hidden_size // text.num_attention_heads)
    return key, key


def periods(seconds: Sequence[float]) -> list[float]:
    """A step's mean in each `REFRESH` successive steps, one of which refreshes: a median of steps would not see it."""
    whole = range(0, len(seconds) - REFRESH + 1, REFRESH)
    return [sum(seconds[first : first + REFRESH]) / REFRESH for first in whole]


def mean_share(plan: Plan) -> float:
    """The share of the visual keys that a step reads under ``plan``, on average over a period of refreshes."""
    policy = plan.vision_policy
    if policy is None:
        return 1.0
    if policy.refresh == 0:
        return policy.secondary
    return ((policy.refresh - 1) * policy.core + policy.secondary) / policy.refresh


def read_bytes(model: Any, batch: int, visual: int, share: float) -> float:
    """What one step has to read: weights of decoder and output head, and ``share`` of the visual key and value rows."""
    unread = ("vision", "visual", "projector", "embed_tokens")
    weights = sum(p.nbytes for name, p in model.named_parameters() if not any(part in name for part in unread))
    text = model.config.get_text_config()
    row = sum(heads * dim for heads, dim in _stored(text)) * model.dtype.itemsize
    return weights + text.num_hidden_layers * batch * row * (TEXT + share * visual)
