"""Who takes part in the cells that run a whole model: stock PyTorch in every mode that fits, and this backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from avl_fx import Plan
from benchmarks._decoding import PLAN
from benchmarks.gpu.flex import FLEX_ATTENTION
from benchmarks.gpu.settings import Settings

__all__ = ["CONTENDERS", "Contender", "add"]

Forward = Callable[..., Any]
IDENTITY = Plan.identity()


@dataclass(frozen=True)
class Contender:
    """One way to run a model."""

    name: str
    cache: str
    """``dynamic`` or ``static``: transformers' own."""
    make: Callable[[Any, Settings], Forward]
    """From the model to what stands in for its ``forward``; called in the process that measures."""
    plan: Plan = IDENTITY
    """What its results have to follow."""
    ours: bool = False
    attention: str = "sdpa"
    """Transformers' name of the decoder's attention implementation."""
    phases: tuple[str, ...] = ("decode", "prefill")

    @property
    def partitioned(self) -> bool:
        """Whether it leaves keys out."""
        return self.plan.vision_policy is not None

    @contextmanager
    def attending(self, model: Any) -> Iterator[None]:
        """Let the decoder of ``model`` use this contender's attention implementation."""
        text = model.config.get_text_config()
        before, text._attn_implementation = text._attn_implementation, self.attention
        try:
            yield
        finally:
            text._attn_implementation = before


def _eager(model: Any, settings: Settings) -> Forward:
    return model.forward


def _inductor(mode: str | None = None) -> Callable[[Any, Settings], Forward]:
    def make(model: Any, settings: Settings) -> Forward:
        how: dict[str, Any] = {"mode": mode} if settings.codegen else {"backend": "eager"}
        return torch.compile(model.forward, **how)

    return make


def _avl(plan: Plan, mode: str | None = None) -> Callable[[Any, Settings], Forward]:
    def make(model: Any, settings: Settings) -> Forward:
        how = {"mode": mode} if settings.codegen else {"compiler": "eager"}
        return torch.compile(model.forward, backend="avl", options={"plan": plan, "strict": True, **how})

    return make


CONTENDERS: dict[str, Contender] = {}
"""Name -> contender, in the order in which they are measured."""


def add(contender: Contender) -> None:
    """Let ``contender`` take part.

    Raises:
        ValueError: there is one of that name.
    """
    if contender.name in CONTENDERS:
        raise ValueError(f"{contender.name!r} takes part already")
    CONTENDERS[contender.name] = contender


def _stock(how: str, cache: str, make: Callable[[Any, Settings], Forward], **more: Any) -> None:
    add(Contender(f"{how}, {cache}", cache, make, **more))


def _ours(plan: Plan, cache: str, mode: str | None = None, **more: Any) -> None:
    what = "identity" if plan == IDENTITY else "partitioned"
    name = ", ".join((f"{what} {mode}" if mode else what, cache))
    add(Contender(name, cache, _avl(plan, mode), plan, ours=True, **more))


# In a prompt the host hardly shows and the cache is only written: there, who differs in those alone does not take part.
_stock("eager", "dynamic", _eager)
_stock("eager", "static", _eager, phases=("decode",))
_stock("Inductor", "dynamic", _inductor())
_stock("Inductor", "static", _inductor(), phases=("decode",))
_stock("Inductor reduce-overhead", "static", _inductor("reduce-overhead"))
_stock("Inductor max-autotune", "static", _inductor("max-autotune"))
_stock("flex_attention reduce-overhead", "static", _inductor("reduce-overhead"), attention=FLEX_ATTENTION)
_ours(IDENTITY, "dynamic")
_ours(IDENTITY, "static", phases=("decode",))
_ours(IDENTITY, "static", "reduce-overhead", phases=("decode",))
_ours(PLAN, "dynamic")
_ours(PLAN, "static")
_ours(PLAN, "static", "reduce-overhead", phases=("decode",))
