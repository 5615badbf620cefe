"""What reads arrays to time it reads all of them."""

import pytest
import torch

from benchmarks.bound import reader
from tests._compiler import skip_without_compiler


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_number_is_read_once(together, threads):
    skip_without_compiler()
    arrays = [torch.arange(count, dtype=torch.float32) % 7 + 1 for count in (1, 127, 128, 129, 1000, 4096)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sums = reader(arrays, together)()
    finally:
        torch.set_num_threads(before)
    assert sums.tolist() == [array.sum().item() for array in arrays]
