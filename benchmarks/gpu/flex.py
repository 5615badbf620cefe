"""flex_attention as the attention of a whole transformers model, for any model and a static cache.

Transformers' own attention with a mask of ours. Its mask keeps the *tensor* that counts the tokens of a static cache,
and the kernel reads it when the cache has moved on already: a decode step sees an empty row, and a prompt sees its own
future. It also breaks the graph at each call (a warning), and not every model declares that it can do with
flex_attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward

__all__ = ["FLEX_ATTENTION"]

FLEX_ATTENTION = "benchmark_flex_attention"


def _mask(*, q_length: int, kv_length: int, q_offset: Any, device: torch.device, **others: Any) -> BlockMask:
    """Causal, alike for all rows: prompts without padding in a cache that starts with them."""
    if others.get("attention_mask") is not None or others.get("kv_offset", 0) != 0:
        raise NotImplementedError("padding, sliding windows")
    first = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
    return create_block_mask(lambda b, h, q, k: k <= q + first, None, None, q_length, kv_length, device=device)


AttentionInterface.register(FLEX_ATTENTION, flex_attention_forward)
AttentionMaskInterface.register(FLEX_ATTENTION, _mask)
