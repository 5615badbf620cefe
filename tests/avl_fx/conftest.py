"""What tests of this folder share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Compute on a single thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
