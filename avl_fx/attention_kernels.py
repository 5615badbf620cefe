"""Attention that runs inside a kernel of another library (FlashAttention, flex_attention), where no pass can see it.

Transformers choose the implementation of attention by name, from the configuration, at each call. FlashAttention's
decides by what is in its mask whether there is padding, and by positions whether sequences were packed, so Dynamo
breaks the graph in each layer; and what it calls is one opaque operator. `avl_fx.compile` therefore asks for the
implementation that is made of PyTorch's operators, as long as the model is compiled: the same function, whose fused
kernels include FlashAttention.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

from torch import nn

from avl_fx import _compat

__all__ = ["KernelChoice", "opaque_kernels", "warn_of_hidden_attention"]

log = logging.getLogger("avl_fx")

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of which it was said that they attend in something else."""


def opaque_kernels(model: nn.Module) -> tuple[str, ...]:
    """Implementations, by name, that ``model`` would run in and whose attention no graph shows; empty: none."""
    return tuple(dict.fromkeys(name for _, _, name in _opaque(model)))


def _opaque(model: nn.Module) -> list[tuple[nn.Module, Any, str]]:
    """Module, its configuration and the implementation, each configuration once."""
    found: dict[int, tuple[nn.Module, Any, str]] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        name = _compat.attention_implementation(config)
        if name is not None and _is_opaque(name):
            found.setdefault(id(config), (module, config, name))
    return list(found.values())


def _is_opaque(name: str) -> bool:
    """FlashAttention of any version, flex_attention, or a kernel of a hub, which is named by its repository."""
    return name.startswith(("flash_attention", "flex_attention")) or "/" in name


@functools.cache
def warn_of_hidden_attention(kernel: str, plan: str) -> None:
    """Say, once for each ``plan``, that it is nothing to attention that runs in ``kernel``."""
    log.warning(
        "A part of the model was captured without its attention, which runs in %s, breaks graphs and is seen by no "
        "pass: %s does nothing to it. Fix: load the model with attn_implementation='sdpa', or use "
        "avl_fx.compile(model, plan=...).",
        kernel,
        plan,
    )


class KernelChoice:
    """Makes ``model`` attend by PyTorch's operators where it would not, until `give_back`."""

    def __init__(self, model: nn.Module) -> None:
        self._changed: list[tuple[Any, str, str]] = []
        """Configuration, and the implementation that it named and names now."""
        for module, config, name in _opaque(model):
            instead = _compat.visible_implementation(module, config)
            if instead is not None:
                self._changed.append((config, name, instead))
                _compat.set_attention_implementation(config, instead)
        for name, instead in () if model in _told else self.replaced.items():
            log.warning(
                "Attention runs in %s instead of %s as long as the model is compiled by avl_fx.compile: no graph shows "
                "what the latter does. Load the model with attn_implementation=%r to say so yourself.",
                instead,
                name,
                instead,
            )
        if self.replaced:
            _told.add(model)

    @property
    def replaced(self) -> dict[str, str]:
        """Implementations that were asked for -> what stands in their place."""
        return {before: instead for _, before, instead in self._changed}

    def give_back(self) -> None:
        """Let it attend as it did before, where nobody has asked for something else since."""
        for config, before, instead in self._changed:
            if _compat.attention_implementation(config) == instead:
                _compat.set_attention_implementation(config, before)
        self._changed.clear()
