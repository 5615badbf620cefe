"""Tests that need a GPU: `pytestmark = NEEDS_GPU` in a module, and `plain_float32` where it compares in float32."""

from collections.abc import Iterator

import pytest
import torch

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
DEVICE = "cuda"


@pytest.fixture
def plain_float32() -> Iterator[None]:
    """Convolutions compute in float32 as it is; by default they round their operands to a shorter format."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def free_memory() -> int:
    """Bytes of the device that nobody uses."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
