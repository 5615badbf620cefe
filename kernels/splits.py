"""Into how many parts a Triton kernel splits the keys of one head: from sizes that the host knows, and nothing else."""

from functools import cache

import torch

__all__ = ["MAX_SPLITS", "split_count"]

KEYS_PER_SPLIT = 256
"""A split shorter than this costs more to merge than it saves."""
MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR = 4
"""How many programs a multiprocessor should have, so that some compute while others wait for memory."""


def split_count(programs: int, keys: int, device: torch.device, shortest: int = KEYS_PER_SPLIT) -> int:
    """A power of two: enough programs for the device, none of them tiny.

    Args:
        programs: how many there are with one split.
        keys: the most that any of them reads.
        device: where they run; off a GPU, under Triton's interpreter, it counts as one multiprocessor.
        shortest: keys that a split should have at least.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * _processors(device) // max(1, programs))
    useful = max(1, min(wanted, keys // shortest, MAX_SPLITS))
    return 1 << (useful - 1).bit_length()


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
