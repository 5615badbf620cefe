"""A mask as `scaled_dot_product_attention` takes it; `avl::attention` takes more."""

import torch
from torch import Tensor


def sdpa_mask(mask: Tensor | None, query: Tensor, float32: bool) -> Tensor | None:
    """``mask`` with four dimensions, boolean or in the query's dtype.

    Args:
        mask: as in the schema: any rank up to 4, any floating dtype.
        query: what the mask is for.
        float32: whether the kernel also takes a float32 mask beside a query of lower precision.
    """
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = mask[None]
    if mask.dtype in (torch.bool, query.dtype) or (float32 and mask.dtype == torch.float32):
        return mask
    # The lowest float32 is -inf in half precision, and a row of nothing else would have no softmax.
    return mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
