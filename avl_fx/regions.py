"""`avl_fx.compile`: the front door for models that Dynamo fragments.

`torch.compile(model)` leaves it to Dynamo where graphs begin and end; multimodal glue code (splicing features, checking
counts, boolean indexing) then breaks the decoder apart in some models. Here the *regions* that matter are compiled in
place, each with the capture settings that it needs: the language decoder, and the vision encoder. The glue between them
stays eager, and a hook tells the decoder which positions are visual.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from avl_fx import _compat
from avl_fx.attention_kernels import KernelChoice
from avl_fx.backend import avl_backend
from avl_fx.errors import CaptureError, OptionError
from avl_fx.modality_hook import ModalityHook
from avl_fx.options import parse_options
from avl_fx.outer_compile import KeepsItsCalls, warns_where_traced
from avl_fx.plan import Plan, PlanSpec
from avl_fx.region import Region, can_generate, find_regions
from avl_fx.region_watch import NothingDone, RegionWatch
from avl_fx.spliced_rows import SplicedRows
from avl_fx.wrappers import unwrapped, wrapping

__all__ = ["compile", "compiled_plan", "replaced_kernels", "set_aside", "uncompile"]

log = logging.getLogger("avl_fx")

_DECODER_SETTINGS: Mapping[str, Any] = {
    # Deep-stacked features are added under a boolean index inside the decoder: without this, one graph a layer. On a
    # whole model it makes vision encoders that split by image fail with data-dependent guards: the decoder alone.
    "capture_dynamic_output_shape_ops": True,
}


RECOMPILE_LIMIT = 16
"""At least so many kinds of call of a decoder. Batches of 1, of another size and of any size, each with and without
padding, prompts, and steps on a cache that is packed or grows: that is more than Dynamo's eight. A decoder that comes
in pieces, where one code object may be all of its layers, has as many for each piece."""


_SETTINGS_OF_DROPPED_KEYS: Mapping[str, Any] = {
    # Past its recompile limit Dynamo runs the frame eagerly and says nothing; under a plan that drops keys that would
    # be a dense layer on a cache without keys.
    "fail_on_recompile_limit_hit": True,
    # Inside of DistributedDataParallel graphs are split where a bucket of gradients is full, and a lazy layer whose
    # anchor is in another piece would be dense. All gradients are exchanged behind the backward then.
    "optimize_ddp": False,
}


class _Removable(Protocol):
    def remove(self) -> None: ...


@dataclass
class _Compiled:
    regions: tuple[Region, ...]
    hooks: tuple[_Removable, ...]
    plan: Plan
    kernels: KernelChoice


_compiled: weakref.WeakKeyDictionary[nn.Module, _Compiled] = weakref.WeakKeyDictionary()


def compile(model: nn.Module, plan: PlanSpec = None, **torch_compile_kwargs: Any) -> nn.Module:
    """Compile the decoder and the vision encoder of ``model`` in place, under ``plan``.

    Like ``nn.Module.compile``: the model's class, parameters and ``generate`` stay what they are. Compiling again
    replaces the plan. A model that attends in a kernel that no graph shows (FlashAttention, flex_attention) attends by
    SDPA until `uncompile`.

    Args:
        model: any vision-language model, also inside of a wrapper (PEFT, DistributedDataParallel). One without a
            decoder that can be told apart (no ``get_decoder``) is compiled as a single region.
        plan: a `Plan`, dict, path or preset name; default: identity.
        **torch_compile_kwargs: as for ``torch.compile``: ``mode``, ``dynamic``, ``fullgraph``, ``disable``, and
            ``options`` of the backend.

    Returns:
        ``model`` itself.

    Raises:
        CaptureError: ``model`` is not a module, or was compiled before by something else.
        OptionError: an option is wrong, or ``backend`` is given.
        PlanError: the plan is wrong, or made for another depth.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"a torch.nn.Module can be compiled, not {type(model).__name__}",
            field="model",
            remedy="pass the model itself, not its class, its name or its outputs",
        )
    kwargs = _arguments(plan, torch_compile_kwargs)
    resolved = Plan.resolve(kwargs["options"]["plan"])
    resolved.check_supported()
    depth = _compat.decoder_depth(unwrapped(model))
    if depth is not None:
        resolved.check_depth(depth)
    regions = find_regions(model)
    _check_uncompiled(model, regions)
    uncompile(model)
    # Of Qwen2.5-Omni the part that thinks is asked to generate: the forward of the whole is never called.
    generating = dict.fromkeys((*wrapping(model), *filter(can_generate, model.modules())))
    hooks: list[_Removable] = [handle for module in generating for handle in ModalityHook.install(module)]
    # Each plan that is tried, and each model of a class, has graphs of its own, up to the limit.
    kwargs = {**_compat.isolation(), **kwargs}
    for region in regions:
        settings = dict(_DECODER_SETTINGS) if region.role == "decoder" else {}
        if region.role != "vision":
            settings["recompile_limit"] = RECOMPILE_LIMIT
            settings |= {} if resolved.is_lossless else _SETTINGS_OF_DROPPED_KEYS
        any_length = resolved.filters_prompts and region.role != "vision"
        silent = resolved == Plan.identity() or region.role == "vision" or kwargs.get("disable")
        watched = RegionWatch(region, None if silent else NothingDone(region.name, resolved.asks_for_positions))
        _compat.compile_module(region.module, settings, kwargs, _limit_hit, watched, any_length)
        if region.role == "decoder":
            hooks += SplicedRows.watch(region.module)
    if not kwargs.get("disable"):
        hooks += [KeepsItsCalls(module) for module in generating if hasattr(module, "get_compiled_call")]
        if all(region.role != "model" for region in regions):  # else it is traced by its own compilation
            hooks.append(warns_where_traced(unwrapped(model)))
    _compiled[unwrapped(model)] = _Compiled(regions, tuple(hooks), resolved, KernelChoice(model))
    return model


def uncompile(model: nn.Module) -> nn.Module:
    """Undo `compile`; a model that is not compiled is left alone."""
    state = _compiled.pop(unwrapped(model), None)
    if state is not None:
        state.kernels.give_back()
        for handle in state.hooks:
            handle.remove()
        for region in state.regions:
            _compat.uncompile_module(region.module)
    return model


def _check_uncompiled(model: nn.Module, regions: tuple[Region, ...]) -> None:
    """Whoever compiles around a region traces it as it is written."""
    whole = [region for region in regions if region.role == "model"]
    around = [module for module in wrapping(model) if _compat.is_compiled(module, in_place=not whole)]
    inside = [region.module for region in regions if _compat.is_compiled(region.module, in_place=False)]
    for module in (*around, *inside):
        raise CaptureError(
            f"{type(_compat.uncompiled(module)).__name__} is compiled by torch.compile already, which would go past "
            "what avl_fx.compile does to the parts of the model",
            field="model",
            remedy="pass the model as it was before torch.compile; or leave it to torch.compile(model, backend='avl', "
            "options={'plan': plan}) alone",
        )


def _limit_hit() -> CaptureError:
    return CaptureError(
        f"a part of the model was compiled {_compat.recompile_limit()} times, each time for another kind of call, and "
        "would run eagerly now, which a plan that drops keys does not allow",
        field="torch._dynamo.config.recompile_limit",
        remedy="raise it where calls differ so much (TORCH_LOGS=recompiles tells how), or leave out what splits the "
        "decoder into one graph a layer (output_attentions, output_hidden_states, hooks such as accelerate sets for "
        "several devices): for such calls avl_fx.uncompile(model) first",
    )


def _arguments(plan: PlanSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``torch.compile``: one backend, one plan, everything checked before the first call."""
    kwargs = dict(given)
    backend = kwargs.pop("backend", None)
    if backend not in (None, "avl", avl_backend):
        raise OptionError(
            f"avl_fx.compile is its own backend, got {backend!r}",
            field="backend",
            remedy="drop backend=, or use torch.compile with the other backend",
        )
    options = dict(kwargs.pop("options", None) or {})
    if plan is not None:
        if options.get("plan") is not None and Plan.resolve(options["plan"]) != Plan.resolve(plan):
            raise OptionError("plan= and options['plan'] differ", field="plan", remedy="give the plan in one place")
        options["plan"] = plan
    mode = kwargs.pop("mode", None)
    if mode is not None:
        # torch.compile takes either mode or options.
        options.setdefault("mode", mode)
    parsed = parse_options(mode, options)
    options["plan"] = parsed.plan
    unknown = set(kwargs) - _compat.compile_arguments()
    if unknown:
        raise OptionError(
            f"torch.compile has no argument {sorted(unknown)[0]!r}",
            field=sorted(unknown)[0],
            remedy="use plan, mode, dynamic, fullgraph, disable, or options={...}",
        )
    return {**kwargs, "backend": avl_backend, "options": options}


def compiled_plan(model: nn.Module) -> Plan | None:
    """The plan that ``model`` was compiled with by `compile`, or ``None``."""
    state = _compiled.get(unwrapped(model))
    return None if state is None else state.plan


def replaced_kernels(model: nn.Module) -> dict[str, str]:
    """Implementations of attention that ``model`` asks for and no graph shows -> what `compile` put in their place."""
    state = _compiled.get(unwrapped(model))
    return {} if state is None else dict(state.kernels.replaced)


@contextlib.contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Take back what `compile` did to ``model``; after the block, what this module knows of it is as before.

    The attributes of the modules themselves are restored by whoever opens the block, see `avl_fx._untouched`.
    """
    key = unwrapped(model)
    state = _compiled.get(key)
    uncompile(model)
    try:
        yield
    finally:
        inside = _compiled.pop(key, None)
        if inside is not None:
            inside.kernels.give_back()
        if state is not None:
            _compiled[key] = replace(state, kernels=KernelChoice(model))
