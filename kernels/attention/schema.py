"""`avl::attention`: the canonical attention node that every recognised site is rewritten to.

The op is an *intermediate representation*: it says what a site means, once, whatever the model wrote (SDPA, softmax
between two matmuls, repeated or un-repeated keys). `lower` replaces every one of them before code generation, so the
reference implementation runs only in tests and in the IR verifier.
"""

import torch
from torch import Tensor

__all__ = ["attention"]


@torch.library.custom_op("avl::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    site: int,
) -> Tensor:
    """Scaled dot-product attention with un-repeated keys and values.

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]`` with ``heads % kv_heads == 0``; query head ``h`` reads key/value
            head ``h // (heads // kv_heads)`` (GQA).
        value: ``[batch, kv_heads, keys, value_dim]``.
        mask: broadcastable to ``[batch, heads, queries, keys]``; boolean (True = visible) or additive in any floating
            dtype; ``None`` means every key is visible. A row that sees no key gives zeros.
        scale: factor on the logits, in query.key units.
        is_causal: upper-left aligned causal mask, as in ``scaled_dot_product_attention``; excludes ``mask``.
        site: number of the site in its graph: ties the node to its `Site` record.

    Returns:
        ``[batch, heads, queries, value_dim]`` in the query's dtype.
    """
    from avl_fx.kernels.attention.reference import attention_reference

    return attention_reference(query, key, value, mask, scale, is_causal)


@attention.register_fake
def _(query, key, value, mask, scale, is_causal, site):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
