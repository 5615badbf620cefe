"""The forward hook of `avl_fx.compile`: tells the decoder which prompt positions are visual."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avl_fx import _compat
from avl_fx.modality import pop_given, push_given, visual_from_ids
from avl_fx.token_ids import visual_token_ids

__all__ = ["ModalityHook", "named_arguments", "reads_ids"]

_open: ContextVar[tuple[Token[Any] | None, ...]] = ContextVar("avl_fx_open_forwards", default=())
"""What takes back the positions given for the forwards that are running, innermost last; each thread has its own."""


def reads_ids() -> bool:
    """Whether a forward is running whose token ids `ModalityHook` has read."""
    return bool(_open.get())


def named_arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> argument of a call; nothing where it does not fit, which the call itself will say."""
    try:
        bound = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return {}
    return {**bound.get("kwargs", {}), **bound}


class ModalityHook:
    """Reads ``input_ids`` (or ``mm_token_type_ids``) before the model's forward and takes the answer back after it.

    Positions the user gave with `avl_fx.modality_ids` win. A forward of one token a row is a decode step: its prompt is
    gone, so nothing is said.
    """

    def __init__(self, model: nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        config = getattr(model, "config", None)
        self._visual_ids = tuple(sorted(visual_token_ids(config)))
        text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None
        if getattr(text, "cross_attention_layers", None) or _compat.is_encoder_decoder(config):
            # Images come in through cross-attention: the image token is an ordinary token of the text (Mllama), or one
            # of a sequence that the decoder's keys do not belong to (Florence-2).
            self._visual_ids = ()

    @classmethod
    def install(cls, model: nn.Module) -> tuple[RemovableHandle, ...]:
        """Hook ``model``; nothing is installed when its configuration names no visual token ids."""
        hook = cls(model)
        if not hook._visual_ids:
            return ()
        return (
            model.register_forward_pre_hook(hook.before, with_kwargs=True),
            model.register_forward_hook(hook.after, always_call=True),
        )

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the visual positions of this forward."""
        _open.set((*_open.get(), push_given(self._visual_positions(args, kwargs))))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take them back, also when the forward raised."""
        *outer, token = _open.get() or (None,)
        _open.set(tuple(outer))
        pop_given(token)

    def _visual_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        named = named_arguments(self._signature, args, kwargs)
        types = named.get("mm_token_type_ids")
        ids = named.get("input_ids")
        if isinstance(types, Tensor) and types.dim() == 2 and types.shape[1] > 1:
            return visual_from_ids(types)
        if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > 1:
            wanted = torch.tensor(self._visual_ids, dtype=ids.dtype, device=ids.device)
            return torch.isin(ids, wanted)
        return None
