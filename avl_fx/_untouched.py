"""Borrow a model, and give it back exactly as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from avl_fx import _compat, regions

__all__ = ["left_untouched"]


@contextlib.contextmanager
def left_untouched(model: nn.Module) -> Iterator[None]:
    """For the block, ``model`` runs eagerly and in eval mode; afterwards it is as before, also when the block raised.

    Restored: every attribute of every module (a forward or call compiled in place, hooks, buffers and other attributes
    that a forward replaces, the training flag), what `avl_fx.compile` knows of the model, and the state of the random
    generators. Not restored: what a forward writes *into* a tensor, such as the running statistics of a batch norm;
    eval mode is what keeps those still.
    """
    kept = [_Attributes(module) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with regions.set_aside(model), torch.random.fork_rng(devices=sorted(devices, key=str)):
            _compat.strip_compilation(model)
            model.eval()
            yield
    finally:
        for attributes in kept:
            attributes.restore()


class _Attributes:
    """The attributes of one module, and what its containers (hooks, buffers, submodules) hold."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values: dict[str, Any] = dict(vars(module))
        self._contents = {
            name: copy.copy(value) for name, value in self._values.items() if isinstance(value, dict | list | set)
        }

    def restore(self) -> None:
        attributes = vars(self._module)
        for name, content in self._contents.items():
            container = self._values[name]
            # In place: handles of hooks refer to the container itself.
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        attributes.clear()
        attributes.update(self._values)
