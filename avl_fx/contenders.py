"""Ways to run one model that an evaluation compares: dense, under a plan, or with anything else put around it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from avl_fx import _compat, regions
from avl_fx.backend import avl_backend
from avl_fx.cache import AVLCache
from avl_fx.options import parse_options
from avl_fx.plan import Plan, PlanSpec
from avl_fx.region import find_region

__all__ = ["Contender"]


@contextlib.contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _as_they_are(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield inputs


@dataclass(frozen=True)
class Contender:
    """One way to run a model; by default as it is."""

    identity: str
    """Tells it from every other: answers that were saved under another identity are not its own."""
    prepare: Callable[[nn.Module], AbstractContextManager[None]] = _as_it_is
    """Entered once, around all batches."""
    around: Callable[[nn.Module, Mapping[str, Any]], AbstractContextManager[Mapping[str, Any]]] = _as_they_are
    """Entered for every ``generate``; gives the inputs to use, which have as many rows as those of the batch."""
    cache: Callable[[nn.Module], Any] | None = None
    """Makes an empty cache; by default the model makes its own."""
    budget: float | None = None
    """Share of the visual keys that it works with, for the picture; ``None``: the share of KV bytes that it stores."""
    period: int = 1
    """So many decode steps are timed together: all that differ, such as those from one refresh to the next."""

    @classmethod
    def of_plan(cls, plan: PlanSpec, *, compiler: str = "eager", compact: bool = False) -> Contender:
        """The model, compiled by `avl_fx.compile` under a plan.

        Args:
            plan: a `Plan`, its data, a path or a preset name.
            compiler: what compiles the graphs; the default runs the rewritten ones without generating code.
            compact: on an `AVLCache` instead of the model's own cache.

        Raises:
            PlanError: the plan is wrong, or not executed by this version.
            OptionError: ``compiler`` is wrong.
        """
        found = Plan.resolve(plan)
        found.check_supported()
        parse_options(None, {"compiler": compiler})
        known = f"plan {found.fingerprint()} {compiler} {'compact' if compact else 'stock'}"
        return cls(
            identity=hashlib.sha256(known.encode()).hexdigest()[:16],
            prepare=functools.partial(_compiled, plan=found, compiler=compiler),
            cache=(lambda model: AVLCache(found, _decoder_config(model))) if compact else None,
            budget=None if found.vision_policy is None else found.vision_policy.core,
            period=1 if found.vision_policy is None else max(1, found.vision_policy.refresh),
        )


def _decoder_config(model: nn.Module) -> Any:
    """That of the model itself need not tell the decoder's layers (remote code)."""
    region = find_region(model, "decoder")
    return model.config if region is None else region.module.config


@contextlib.contextmanager
def _compiled(model: nn.Module, *, plan: Plan, compiler: str) -> Iterator[None]:
    options = {"plan": plan, "compiler": compiler, "strict": True}
    # A new callable each time: Dynamo reuses the code of an earlier backend that equals this one.
    backend = functools.partial(avl_backend, options=options)
    with _compat.fresh_compilation(backend, model):
        regions.compile(model, plan, options=options)
        try:
            yield
        finally:
            regions.uncompile(model)
