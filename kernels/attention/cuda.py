"""CUDA/ROCm lowering of `avl::attention` to PyTorch's fused kernels.

The fused CUDA kernels read grouped keys natively only without a mask and up to head dim 256; otherwise SDPA falls back
to its math path, which materialises the whole attention matrix. A single query row can instead be *packed*: the query
heads of one group become the query rows of that key head, and no key is repeated. What is left repeats keys as the
model itself did.
"""

import torch.nn.functional as F
from torch import Tensor

from avl_fx.kernels.attention.masks import sdpa_mask
from avl_fx.kernels.attention.values import with_even_dims

MAX_GROUPED_HEAD_DIM = 256


@with_even_dims
def attention_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    """`avl::attention` on CUDA/ROCm; see the schema for shapes."""
    # No size but the heads' is written into the graph: the others may be symbolic.
    heads, queries, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    mask = sdpa_mask(mask, query, float32=False)
    if groups == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, is_causal=is_causal)
    if mask is None and head_dim == value.shape[-1] and head_dim <= MAX_GROUPED_HEAD_DIM:
        return F.scaled_dot_product_attention(query, key, value, scale=scale, is_causal=is_causal, enable_gqa=True)
    if isinstance(queries, int) and queries == 1 and not is_causal:
        packed = query.unflatten(1, (kv_heads, groups)).squeeze(3)
        if mask is not None and mask.shape[1] == heads:
            mask = mask.unflatten(1, (kv_heads, groups)).squeeze(3)
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
        return out.flatten(1, 2).unsqueeze(2)
    return F.scaled_dot_product_attention(
        query, _repeat(key, groups), _repeat(value, groups), attn_mask=mask, scale=scale, is_causal=is_causal
    )


def _repeat(x: Tensor, groups: int) -> Tensor:
    return x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
