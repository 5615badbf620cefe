"""What `avl::append_rows` means where nothing was left out."""

import torch
from torch import Tensor


def append_rows_reference(stored: Tensor, new: Tensor, length: int, plan: str) -> Tensor:
    """`avl::append_rows`; see the schema for shapes."""
    if stored.shape[2] != length:
        raise RuntimeError(
            f"a compact cache holds {stored.shape[2]} rows of {length} tokens, and this graph asks for all of them. "
            'Fix: compile the model with backend="avl" and the plan that the cache was made for.'
        )
    return torch.cat([stored, new], 2)
