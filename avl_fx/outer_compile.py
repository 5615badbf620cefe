"""Compilers around what `avl_fx.compile` compiled: Dynamo traces modules as they are written, past all that.

Transformers' `generate` is one, by itself: on GPUs it compiles the whole model with Inductor for the decode steps of a
static cache. The plan would do nothing in them, or leave them without the keys of its lazy layers.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["KeepsItsCalls", "warns_where_traced"]

log = logging.getLogger("avl_fx")

_METHOD = "get_compiled_call"


def get_compiled_call(self: nn.Module, compile_config: Any = None) -> Callable[..., Any]:
    """What `generate` calls for such steps: the model, whose regions are compiled already."""
    return self.__call__


class KeepsItsCalls:
    """Lets ``model`` answer `generate` with its own call until `remove`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Bound, so that a deep copy answers with its own call, too.
        vars(model)[_METHOD] = types.MethodType(get_compiled_call, model)

    def remove(self) -> None:
        """Let it compile itself again."""
        vars(self._model).pop(_METHOD, None)


def warns_where_traced(model: nn.Module) -> RemovableHandle:
    """Say it once where ``model`` is traced as a whole."""
    return model.register_forward_pre_hook(_Warning())


class _Warning:
    def __init__(self) -> None:
        self._said = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self._say(type(module).__name__)

    @torch.compiler.disable
    def _say(self, name: str) -> None:
        if self._said:
            return
        self._said = True
        log.warning(
            "%s was compiled by avl_fx.compile, and now torch.compile traces it as it is written: the plan does "
            "nothing there, and where it left keys of lazy layers out logits are NaN. Fix: drop the outer "
            "torch.compile, or avl_fx.uncompile(model) and torch.compile(model, backend='avl', "
            "options={'plan': plan}).",
            name,
        )
