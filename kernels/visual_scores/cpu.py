"""CPU implementation of `avl::visual_scores`: the scoring queries are gathered first, the rest is a small product."""

import torch
from torch import Tensor

from avl_fx.kernels.visual_scores.rows import scoring_rows


def visual_scores_cpu(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
) -> Tensor:
    """`avl::visual_scores` on CPU; see the schema for shapes."""
    batch, heads, _, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    groups = heads // kv_heads
    rows, real = scoring_rows(query, key, mask, positions, is_causal, window)
    count = rows.shape[1]
    index = rows[:, None, :, None]
    chosen = query.gather(2, index.expand(-1, heads, -1, head_dim)).float() * scale
    packed = chosen.reshape(batch, kv_heads, groups * count, head_dim)
    logits = (packed @ key.float().transpose(-1, -2)).view(batch, heads, count, keys)
    if is_causal:
        logits.masked_fill_(torch.arange(keys, device="cpu") > index, float("-inf"))
    if mask is not None:
        bias = mask.expand(batch, -1, -1, -1).gather(2, index.expand(-1, mask.shape[1], -1, keys))
        if bias.dtype == torch.bool:
            logits.masked_fill_(~bias, float("-inf"))
        else:
            bias = bias.float()
            logits.add_(bias).masked_fill_(bias == float("-inf"), float("-inf"))
    seen = (logits.amax(dim=-1, keepdim=True) != float("-inf")) & real[:, None, :, None]
    weights = torch.softmax(logits, dim=-1).masked_fill_(~seen, 0.0)
    total = weights.view(batch, kv_heads, groups * count, keys).sum(dim=2)
    return total / (groups * real.sum(dim=1).clamp(min=1))[:, None, None]
