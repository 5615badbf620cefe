"""What stands where the keys of a lazy layer would have been.

A lazy layer neither computes nor stores keys, but transformers' stock caches have a key tensor for every layer and ask
it for its length. So a DynamicCache gets a *marker*: one NaN expanded to the shape of the keys, without memory of its
own. A StaticCache keeps its buffer, filled with NaN once. Dense attention over either cannot pass for an answer:
compiled graphs check for it and raise `CacheStateError`; code that this backend never sees yields NaN instead of a
plausible token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from avl_fx.errors import CacheStateError

__all__ = ["Nans", "check_stored", "is_dropped", "mark_buffer", "marker"]

_ATTRIBUTE = "_avl_dropped_keys"
Nans = dict[tuple[torch.dtype, torch.device], Tensor]
"""What markers of one cache share. Not those of several: who wipes a cache may write to its markers."""


def marker(like: Tensor, head_dim: int, shared: Nans | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A stand-in for keys ``[*like.shape[:-1], head_dim]`` that occupies one element.

    Args:
        like: a tensor of the same size but for the last dimension, and device.
        head_dim: that of the keys.
        shared: what other markers of the same cache occupy; a new element is added where there is none.
        dtype: that of the keys; default: that of ``like``.
    """
    shared = {} if shared is None else shared
    dtype = dtype or like.dtype
    key = (dtype, like.device)
    nan = shared.get(key)
    if nan is None:
        with torch.inference_mode(False):
            nan = shared[key] = torch.full((), float("nan"), dtype=dtype, device=like.device)
    return nan.expand(*like.shape[:-1], head_dim)


def mark_buffer(keys: Tensor) -> None:
    """Fill a static key buffer with NaN, once after each reset."""
    marked = getattr(keys, _ATTRIBUTE, None) == _version(keys)
    # Inference tensors do not count their writes: a reset shows in the elements alone.
    if not marked or (keys.is_inference() and not is_dropped(keys)):
        with torch.no_grad():
            keys.fill_(float("nan"))
        setattr(keys, _ATTRIBUTE, _version(keys))


def is_dropped(keys: Tensor) -> bool:
    """Whether ``keys`` stands for keys that were never stored."""
    if keys.dim() and keys.shape[-1] > 1 and keys.stride(-1) == 0:
        return True
    version = getattr(keys, _ATTRIBUTE, None)
    if version is None:
        return False
    if version == _version(keys) and not keys.is_inference():
        return True
    # Inference tensors do not count their writes, and a reset buffer was written: look at one element.
    return bool(keys.flatten()[:1].isnan().any())


def check_stored(keys: Tensor, layer: int | None) -> None:
    """Raise when a graph is about to attend densely to keys that a lazy plan did not store.

    Args:
        keys: what the cache has in the place of keys.
        layer: whose they are, where that is known.

    Raises:
        CacheStateError: naming the layer.
    """
    if is_dropped(keys):
        who = "a decoder layer" if layer is None else f"decoder layer {layer}"
        raise CacheStateError(
            f"{who} is about to attend to keys that a lazy plan did not store in this cache",
            field="cache",
            remedy="use a fresh cache, or run every step on this cache under the plan that filled it; if it is the "
            "same plan, a graph was refused its lazy rewrite and avl_fx.explain(model, plan, ...) says why",
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
