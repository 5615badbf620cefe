"""Tells the backend which modules are the language decoder's, where a part of a model is compiled as a region.

A vision encoder may look like a decoder (DeepSeek-OCR 2's is causal: it was a language model once), and a frame of its
own does not show what it belongs to. Who compiled the region knows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn

__all__ = ["call_region", "region_decoder"]

Decoder = Callable[[], frozenset[nn.Module]]

_decoder: ContextVar[Decoder | None] = ContextVar("avl_fx_region_decoder", default=None)


def call_region(decoder: Decoder, call: Callable[[], Any]) -> Any:
    """Make ``call``, which runs a region; in what is compiled meanwhile ``decoder()`` are the decoder's modules."""
    token = _decoder.set(decoder)
    try:
        return call()
    finally:
        _decoder.reset(token)


def region_decoder() -> frozenset[nn.Module] | None:
    """Modules of the language decoder in the region that is running, none in a vision encoder; ``None``: no region."""
    decoder = _decoder.get()
    return None if decoder is None else decoder()
