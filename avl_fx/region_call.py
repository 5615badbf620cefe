"""What the backend and who compiled a part of a model as a region tell each other while it runs.

A vision encoder may look like a decoder (DeepSeek-OCR 2's is causal: it was a language model once), and a frame of its
own does not show what it belongs to. Who compiled the region knows. That a decoder comes in pieces (one graph a layer,
where each layer loops over its experts) the backend sees, and who calls the region has to make room for them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["RunningRegion", "call_region", "note_pieces", "region_decoder"]


@dataclass
class RunningRegion:
    """A region that is called."""

    decoder: Callable[[], frozenset[nn.Module]]
    """The language decoder's modules in it."""
    pieces: int = 1
    """How many graphs one kind of call takes, as far as that is known."""


_running: ContextVar[RunningRegion | None] = ContextVar("avl_fx_running_region", default=None)


def call_region(region: RunningRegion, call: Callable[[], Any]) -> Any:
    """Make ``call``, which runs ``region``: the backend may ask about it meanwhile."""
    token = _running.set(region)
    try:
        return call()
    finally:
        _running.reset(token)


def region_decoder() -> frozenset[nn.Module] | None:
    """Modules of the language decoder in the region that is running, none in a vision encoder; ``None``: no region."""
    region = _running.get()
    return None if region is None else region.decoder()


def note_pieces(pieces: int) -> int:
    """Take note that the region that is running comes in so many ``pieces``: how many times as many as was known."""
    region = _running.get()
    if region is None or region.pieces >= pieces:
        return 1
    factor = -(-pieces // region.pieces)
    region.pieces *= factor
    return factor
