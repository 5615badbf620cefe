"""`avl::fused_attention`: a device's lowering of `avl::attention` as one operator.

Written out as PyTorch calls (`lower`) attention is chosen from its sizes while a graph is compiled. Where these depend
on data there is nothing to choose by yet (masks of CUDA's kernels are aligned by their size), so the choice is left to
the call. It has no gradient.
"""

import torch
from torch import Tensor

__all__ = ["fused_attention"]


@torch.library.custom_op("avl::fused_attention", mutates_args=())
def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    """Scaled dot-product attention; arguments and result as of `avl::attention`, the result contiguous."""
    from avl_fx.kernels.attention import LOWERINGS
    from avl_fx.kernels.dispatch import implementation

    attend = implementation("fused_attention", LOWERINGS, query.device)
    return attend(query, key, value, mask, scale, is_causal).contiguous()


@fused_attention.register_fake
def _(query, key, value, mask, scale, is_causal):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
