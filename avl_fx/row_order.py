"""Where the rows of a cache stood when they entered it.

A partitioned cache is complete, but its rows have moved. That is nobody's business as long as all of them are read; it
is as soon as some are cut off: ``crop`` takes the last rows away, and an early token may lie there. So the memory of a
dynamic cache remembers its partition, and a graph that does not continue the partition gets the rows as they entered.

What is copied elsewhere (beams, a batch that is selected from) is as complete, and nobody knows its order any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avl_fx.errors import CacheStateError
from avl_fx.partition import Partition

__all__ = ["as_entered", "detach", "remember", "sources"]

_ATTRIBUTE = "_avl_row_order"
"""On untyped storages: all views of a tensor have one storage, also those made under inference mode. And on the tensors
themselves, whose deep copies keep it."""
_used = False
"""Whether any storage has the attribute: without a partition nobody need look."""


class _Memory(NamedTuple):
    # Made for every tensor at every step: a frozen dataclass takes four times as long.
    partition: Partition
    generation: int
    layer: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, tuple(self)


def _loaded(*fields: Any) -> _Memory:
    """A memory that was pickled with its tensor, perhaps by a process in which another partition was looked for."""
    global _used
    _used = True
    return _Memory(*fields)


def remember(tensor: Tensor, partition: Partition, layer: int) -> None:
    """Note that the rows of ``tensor``, keys or values of a dynamic cache, lie as ``layer`` of ``partition`` says."""
    global _used
    _used = True
    memory = _Memory(
        partition, partition.generation, layer, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    )
    setattr(tensor.untyped_storage(), _ATTRIBUTE, memory)
    setattr(tensor, _ATTRIBUTE, memory)


def detach(tensor: Tensor) -> None:
    """Forget what `remember` noted about ``tensor``: its rows are others by now."""
    storage = tensor.untyped_storage()
    for place in (tensor, storage):
        if hasattr(place, _ATTRIBUTE):
            delattr(place, _ATTRIBUTE)


def sources(partition: Partition, layer: int, keys: int) -> Tensor | None:
    """Where the rows of ``layer`` lie now, by the position at which they entered.

    Returns int64 ``[batch, G, keys]`` on the CPU, G 1 or the number of KV heads; ``None`` when none has moved.
    """
    entered = partition.entered(layer, keys)
    found = entered.argsort(-1)
    return None if torch.equal(found, torch.arange(keys, device="cpu").expand_as(found)) else found


def as_entered(args: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    """``args`` with the rows of the cache tensors at ``positions`` where they entered; copies of the same strides.

    Raises:
        CacheStateError: rows were cut off, and which ones they were cannot be told any more.
    """
    args = list(args)
    for position in positions if _used else ():
        tensor = args[position]
        places = (tensor.untyped_storage(), tensor, tensor._base)
        memory = next((m for m in (getattr(place, _ATTRIBUTE, None) for place in places) if m is not None), None)
        if memory is not None:
            args[position] = _as_entered(tensor, memory)
    return args


def _as_entered(tensor: Tensor, memory: _Memory) -> Tensor:
    keys = tensor.shape[2]
    same_rows = (
        tensor.shape[:2] == memory.size[:2]
        and tensor.stride() == memory.stride
        and tensor.storage_offset() == memory.offset
    )
    if not same_rows or memory.generation != memory.partition.generation:
        if keys >= memory.size[2]:
            return tensor  # complete: dense attention does not ask for the order
        raise CacheStateError(
            f"{memory.size[2] - keys} rows were cut off a partitioned cache of decoder layer {memory.layer}, and which "
            "tokens lay there is not known any more: another cache that shares its memory has gone on",
            field="cache",
            remedy="crop before the other cache goes on, or continue a copy.deepcopy of the cache",
        )
    total = max(keys, memory.size[2])
    source = sources(memory.partition, memory.layer, total)
    if source is None:
        return tensor
    batch, heads, _, dim = tensor.shape
    whole = tensor.as_strided((batch, heads, total, dim), tensor.stride())
    index = source[..., :keys, None].to(tensor.device).expand(-1, heads, -1, dim)
    copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copied.copy_(whole.gather(2, index))
