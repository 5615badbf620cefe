"""The parts of a model that `avl_fx.compile` compiles as one piece each, wherever its code keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from avl_fx import _compat
from avl_fx.wrappers import unwrapped

__all__ = ["Region", "ask", "can_generate", "find_region", "find_regions"]


@dataclass(frozen=True)
class Region:
    """A module that is compiled as one piece."""

    name: str
    """Module path; empty for the model itself."""
    module: nn.Module
    role: str
    """``decoder``, ``vision`` or ``model``."""


def find_regions(model: nn.Module) -> tuple[Region, ...]:
    """The regions that `compile` compiles: decoder and vision encoder where both can be told apart, else the model."""
    asked = unwrapped(model)
    decoder = ask(asked, "get_decoder")
    if decoder is None or decoder is asked:
        decoder = _language_model(asked)
    while decoder is not None and decoder is not asked and can_generate(decoder):
        # What generates may be wrapped (PEFT) and called by its forward; what it decodes with is called as it is.
        inner = ask(decoder, "get_decoder")
        if inner is None or inner is decoder:
            break
        decoder = inner
    if _compat.is_encoder_decoder(getattr(decoder, "config", None)):
        # Its own forward may never be called, only those of its halves.
        decoder = ask(cast(nn.Module, decoder), "get_decoder") or decoder
    if decoder is None or decoder is asked:
        return (Region("", model, "model"),)
    regions = [Region(_path(model, decoder), decoder, "decoder")]
    vision = ask(asked, "get_encoder", modality="image")
    if vision is not None and vision is not asked and vision is not decoder and _path(model, vision):
        inside = any(m is decoder for m in vision.modules()) or any(m is vision for m in decoder.modules())
        if not inside:
            regions.append(Region(_path(model, vision), vision, "vision"))
    return tuple(regions)


def find_region(model: nn.Module, role: str) -> Region | None:
    """The one of `find_regions` that has this role."""
    return next((region for region in find_regions(model) if region.role == role), None)


def ask(model: nn.Module, method: str, **kwargs: Any) -> nn.Module | None:
    """The module that ``model.method(**kwargs)`` names, if it can say."""
    try:
        found = getattr(model, method)(**kwargs)
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _language_model(model: nn.Module) -> nn.Module | None:
    """What ``model`` generates with where that is a part of it (remote code: MiniCPM-V's ``llm``).

    The outermost parts that can generate are asked: the only one, or the one whose token embedding is the model's.
    """
    found: list[nn.Module] = []
    inside = list(model.children())
    while inside:
        module = inside.pop(0)
        if can_generate(module):
            found.append(module)
        else:
            inside += module.children()
    embedding = ask(model, "get_input_embeddings")
    if len(found) > 1:
        found = [m for m in found if embedding is not None and ask(m, "get_input_embeddings") is embedding]
    return found[0] if len(found) == 1 else None


def can_generate(module: nn.Module) -> bool:
    """Whether ``module`` has transformers' `generate`, or wraps what has it."""
    return hasattr(module, "prepare_inputs_for_generation")


def _path(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, m in model.named_modules() if m is module), "")
