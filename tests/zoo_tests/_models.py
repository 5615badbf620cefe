"""Zoo models made once for both test files."""

from functools import cache

import torch

from tests.zoo import get


@cache
def model_of(name: str, attn_implementation: str = "sdpa") -> torch.nn.Module:
    """Shared: a test that changes weights makes its own."""
    return get(name).make(attn_implementation)
