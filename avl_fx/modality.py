"""The modality side channel: row-wise visual positions of one forward, for graphs that cannot see them.

Positions travel three ways. *Discovered*: a graph that splices image features in returns its mask and the runtime
attaches it to the embeddings that leave the graph. *Carried*: the next graph of the same forward finds it on its
inputs. *Given*: the user names the modality of every position, or `avl_fx.compile` does: it reads token ids
(`modality_hook`), or sees what is spliced into the embeddings (`spliced_rows`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avl_fx.errors import ModalityError

__all__ = [
    "attach",
    "audio_masks",
    "carried",
    "detach",
    "given",
    "given_keys",
    "given_rows",
    "mark_audio_mask",
    "may_carry",
    "modality_ids",
    "pop_given",
    "push_given",
    "visual_from_ids",
]

_ATTRIBUTE = "_avl_visual_positions"
_AUDIO_MASK = "_avl_audio_mask"
_AUDIO_TYPE = 3


@dataclass
class _Given:
    visual: Tensor
    first: int | None = None
    """The key position that they start at; ``None`` until a forward that is as long as they are tells."""


_given: ContextVar[_Given | None] = ContextVar("avl_fx_visual_positions", default=None)


@contextlib.contextmanager
def modality_ids(ids: Tensor) -> Iterator[None]:
    """Tell the backend the modality of every prompt position, for models whose graphs do not show it.

    It holds in the thread that says it: say it in the one that calls the model.

    ::

        with avl_fx.modality_ids(ids):
            model.generate(**inputs)

    Args:
        ids: ``[batch, sequence]``; integers as in transformers' ``mm_token_type_ids`` (0 = text, 1 image, 2 video, 3
            audio, which counts as text; anything else is visual) or booleans (True = visual). Those of the first
            forward of this length, or else of the first keys in the cache; of every row of the batch that the model
            sees (``generate`` repeats rows for beams). Where they fit neither they are not used.

    Raises:
        ModalityError: wrong type, rank or dtype.
    """
    token = _given.set(_Given(visual_from_ids(ids)))
    try:
        yield
    finally:
        _given.reset(token)


def visual_from_ids(ids: Any) -> Tensor:
    """Boolean ``[batch, sequence]`` of the visual positions in ``ids``; see `modality_ids` for errors."""
    if not isinstance(ids, Tensor):
        raise ModalityError(
            f"must be a tensor, got {type(ids).__name__}", field="ids", remedy="give a [batch, sequence] tensor"
        )
    if ids.dim() != 2:
        raise ModalityError(
            f"must have shape [batch, sequence], got {tuple(ids.shape)}",
            field="ids",
            remedy="give one row per batch element, for example ids[None]",
        )
    if ids.dtype == torch.bool:
        return ids
    if ids.dtype.is_floating_point or ids.dtype.is_complex:
        raise ModalityError(
            f"must hold integers or booleans, got {ids.dtype}", field="ids", remedy="0 = text, 1 = image, 2 = video"
        )
    return (ids != 0) & (ids != _AUDIO_TYPE)


def given() -> Tensor | None:
    """Visual positions the user gave for the forward that is running, ``[batch, sequence]`` boolean."""
    found = _given.get()
    return None if found is None else found.visual


def given_keys(queries: int, keys: int) -> int | None:
    """The key position that the given positions start at, in a cache of ``keys``, ``queries`` of them this forward's.

    ``None``: nothing is given, or the cache does not hold all of them (yet).
    """
    found = _given.get()
    if found is None:
        return None
    width = found.visual.shape[1]
    if found.first is None and queries == width:
        found.first = keys - queries
    first = found.first or 0
    return first if first + width <= keys else None


def given_rows(queries: int, past: int | None) -> Tensor | None:
    """Those of the given positions that the forward of ``queries`` tokens behind ``past`` others has.

    Returns:
        bool ``[batch, queries]``; ``None``: nothing is given, or where they start is not known.
    """
    found = _given.get()
    if found is None:
        return None
    width = found.visual.shape[1]
    if found.first is None and queries == width:
        found.first = past
        return found.visual
    if past is None:
        return None
    start = past - (found.first or 0)
    if start < 0:
        return None
    rows = found.visual[:, start : start + queries]
    return torch.nn.functional.pad(rows, (0, queries - rows.shape[1]))


def push_given(visual: Tensor | None) -> Token[_Given | None] | None:
    """Give ``visual`` for the forward that starts now, unless the user already gave positions."""
    return _given.set(_Given(visual)) if visual is not None and _given.get() is None else None


def pop_given(token: Token[_Given | None] | None) -> None:
    """Undo `push_given`."""
    if token is not None:
        _given.reset(token)


def attach(outputs: Iterable[Any], visual: Tensor) -> None:
    """Let ``visual`` ride on every output that looks like hidden states ``[batch, sequence, hidden]``."""
    for tensor in outputs:
        if may_carry(tensor) and tensor.shape[:2] == visual.shape:
            setattr(tensor, _ATTRIBUTE, visual)


def detach(tensor: Tensor) -> None:
    """Let no visual positions ride on ``tensor``."""
    vars(tensor).pop(_ATTRIBUTE, None)


def may_carry(tensor: Any) -> bool:
    """Whether ``tensor`` looks like hidden states ``[batch, sequence, hidden]``: visual positions ride on no others."""
    return isinstance(tensor, Tensor) and tensor.dim() == 3


def carried(inputs: Iterable[Any]) -> Tensor | None:
    """Visual positions that ride on one of ``inputs``."""
    for tensor in inputs:
        if may_carry(tensor):
            visual = getattr(tensor, _ATTRIBUTE, None)
            if visual is not None:
                return visual
    return None


def mark_audio_mask(mask: Tensor) -> None:
    """Let a later graph of the same forward know that ``mask`` names positions of audio."""
    setattr(mask, _AUDIO_MASK, True)


def audio_masks(inputs: Iterable[Any]) -> frozenset[int]:
    """The positions among ``inputs`` of what `mark_audio_mask` marked."""
    return frozenset(i for i, tensor in enumerate(inputs) if getattr(tensor, _AUDIO_MASK, False) is True)
