"""Rows of a decoder's input embeddings that are no token's: images, spliced in by code around the decoder.

Remote code (InternVL's ``chat``, the original LLaVA, MiniCPM-V) and some of transformers' own (BLIP-2's ``generate``)
embeds the tokens of a prompt, writes image features over or between them, and hands ``inputs_embeds`` to the decoder or
to its ``generate``. The forward of the model is not called then, and no configuration need name a token for images. But
what the token embedding returned was seen, so what reaches the decoder and is none of it came from elsewhere.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avl_fx.modality_hook import named_arguments, reads_ids
from avl_fx.region import ask

__all__ = ["SplicedRows", "fingerprints"]

MOST_CALLS = 4096
"""Calls of a token embedding to remember: one for each piece of text of each row of a batch."""


@dataclass
class _Embedded:
    """Fingerprints ``[n]`` of what a token embedding returned since a decoder last took embeddings."""

    rows: deque[Tensor] = field(default_factory=lambda: deque(maxlen=MOST_CALLS))
    taken: bool = False
    """A decoder has seen them. It may come back: a prompt can be fed in pieces."""


_embedded: ContextVar[_Embedded | None] = ContextVar("avl_fx_embedded_tokens", default=None)


class SplicedRows:
    """Watches the token embedding of ``decoder``, and says which rows of its ``inputs_embeds`` are none of that."""

    def __init__(self, decoder: nn.Module) -> None:
        self._signature = inspect.signature(decoder.forward)

    @staticmethod
    def watch(decoder: nn.Module) -> tuple[RemovableHandle, ...]:
        """Remember what ``decoder``'s token embedding returns to others; nothing is watched where it has none."""
        embedding = ask(decoder, "get_input_embeddings")
        return () if embedding is None else (embedding.register_forward_hook(_remember),)

    def embeddings(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The embeddings ``[batch, sequence > 1, hidden]`` of a prompt that ``decoder(*args, **kwargs)`` is given."""
        embeds = named_arguments(self._signature, args, kwargs).get("inputs_embeds")
        usual = isinstance(embeds, Tensor) and embeds.dim() == 3 and embeds.shape[1] > 1
        return embeds if usual else None

    def positions(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """bool ``[batch, sequence]``: rows that are no token's, without those that are zero or hidden (padding).

        ``None``: the decoder is given no embeddings, or none of them is a token's, so that somebody has changed all.
        """
        embeds, embedded = self.embeddings(args, kwargs), _embedded.get()
        if embeds is None or embedded is None or not embedded.rows:
            return None
        embedded.taken = True
        rows = fingerprints(embeds)
        tokens = torch.isin(rows, torch.cat([known.to(rows.device) for known in embedded.rows]))
        if not tokens.any():
            return None
        spliced = ~tokens & (rows != 0)
        mask = named_arguments(self._signature, args, kwargs).get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= rows.shape[1]:
            spliced &= mask[:, -rows.shape[1] :].to(rows.device).bool()
        return spliced


def _remember(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: what is computed later may be written over ``output`` in place, so its fingerprints are taken."""
    if torch.compiler.is_compiling() or reads_ids() or type(output) is not Tensor or not output.dim():
        return
    embedded = _embedded.get()
    if embedded is None or embedded.taken:
        embedded = _Embedded()
        _embedded.set(embedded)
    embedded.rows.append(fingerprints(output).flatten())


@torch.no_grad()
def fingerprints(rows: Tensor) -> Tensor:
    """int64 ``[...]`` of rows ``[..., hidden]``: the same for the same bits, and else hardly ever; zero for zeros."""
    bits = rows.detach().contiguous()
    size = next(dtype for dtype in _WORDS if bits.shape[-1] * bits.itemsize % dtype.itemsize == 0)
    words = bits.view(size).long()
    before, after = _factors(words.shape[-1]).to(words.device)
    mixed = words * before
    mixed ^= mixed >> 32  # the low bits of round numbers are zeros, and no factor brings anything down to them
    return (mixed * after).sum(-1)


_WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)


@functools.lru_cache(maxsize=8)
def _factors(count: int) -> Tensor:
    """int64 ``[2, count]``, odd."""
    generator = torch.Generator().manual_seed(count)
    some = torch.randint(-(2**62), 2**62, (2, count), generator=generator, dtype=torch.int64, device="cpu")
    return some * 2 + 1
