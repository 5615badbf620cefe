"""`explain`: run a model once under the backend, and say what became of every attention call."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from avl_fx import _compat, regions
from avl_fx._digest import Run, digest
from avl_fx._inputs import check_inputs
from avl_fx._messages import near_miss, show
from avl_fx._untouched import left_untouched
from avl_fx.attention_kernels import opaque_kernels
from avl_fx.backend import avl_backend
from avl_fx.errors import CacheStateError, CaptureError, OptionError
from avl_fx.options import parse_options
from avl_fx.plan import Plan, PlanSpec
from avl_fx.record import recording
from avl_fx.region import find_region
from avl_fx.report import ForwardReport, Report
from avl_fx.wrappers import wrapping

__all__ = ["FRONT_DOORS", "explain"]


def explain(
    model: nn.Module,
    plan: PlanSpec = None,
    *,
    front_door: str = "torch.compile",
    compiler: str = "eager",
    keep_graphs: bool = False,
    new_tokens: int = 3,
    run: Callable[..., Any] | None = None,
    **inputs: Any,
) -> Report:
    """Run ``model`` under a plan and report what was found, rewritten, refused and saved.

    ::

        print(avl_fx.explain(model, plan, **processor(images=image, text=prompt, return_tensors="pt")))

    The model runs for real, prefill and a few decode steps, but by default no code is generated, so this takes seconds.
    It is left exactly as it was: its forward, hooks, compiled code, training flag, and the random generators.

    Args:
        model: any module; may be compiled already, which is set aside for the run.
        plan: as for the backend; default: identity.
        front_door: how the model is compiled: ``"torch.compile"`` (the whole forward) or ``"avl_fx.compile"`` (the
            decoder and the vision encoder, each as one piece).
        compiler: what compiles the rewritten graphs: ``"eager"``, ``"aot_eager"`` or ``"inductor"``.
        keep_graphs: keep the text of every graph before and after, for `Report.dump`.
        new_tokens: tokens to generate, at least 1: one prefill and ``new_tokens - 1`` decode steps.
        run: a loop of your own, called as ``run(model, **inputs)``, for models whose `generate` is not that of
            transformers and hands nothing on to one. Without it those are called once.
        **inputs: what the model takes, for example the output of a processor; also keyword arguments of `generate`,
            such as ``use_cache=False`` or ``cache_implementation="static"``.

    Raises:
        CaptureError: ``model`` is no module, or ``inputs`` hold no tensor, or something else where a tensor belongs.
        OptionError: ``front_door``, ``compiler`` or ``new_tokens`` is wrong.
        PlanError: the plan is wrong, cannot be executed by this version, or is for another depth.

    Whatever the model itself raises on its inputs is passed on.
    """
    model = _compat.uncompiled(model)
    _check_model(model)
    check_inputs(model, inputs, "explain(model, plan, **processor(..., return_tensors='pt'))")
    resolved = Plan.resolve(plan)
    options = {"plan": resolved, "compiler": compiler}
    parse_options(None, options)
    if front_door not in FRONT_DOORS:
        raise _unknown_door(front_door)
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise OptionError(f"must be an int of at least 1, got {show(new_tokens)}", field="new_tokens", remedy="give 3")
    resolved.check_supported()
    depth = _compat.decoder_depth(model)
    if depth is not None:
        resolved.check_depth(depth)

    # A new callable each time: Dynamo would reuse the code of an earlier, equal backend, and nothing would be recorded.
    backend = functools.partial(avl_backend, options=options)
    breaks = _compat.graph_breaks()
    start = time.perf_counter()
    with recording(keep_graphs) as recorder:
        result = Run(model, resolved, front_door, compiler, recorder, was_training=model.training)
        with left_untouched(model), _compat.fresh_compilation(backend, model), torch.no_grad(), _quiet():
            FRONT_DOORS[front_door](model, options, functools.partial(_Watch, result))
            result.kernels = {name: name for name in opaque_kernels(model)} | regions.replaced_kernels(model)
            # Steps of a fragmented decoder may disagree on which keys exist. That is a finding, not the end.
            with _noting(result):
                _drive(result, new_tokens, run, inputs)
    result.seconds = time.perf_counter() - start
    result.breaks = {k: n - breaks.get(k, 0) for k, n in _compat.graph_breaks().items() if n > breaks.get(k, 0)}
    return digest(result)


# ---- front doors -------------------------------------------------------------------------------------------------


Watch = Callable[[Callable[..., Any]], Callable[..., Any]]


def _bare(model: nn.Module, options: Mapping[str, Any], watch: Watch) -> None:
    compiled = torch.compile(model.forward, backend=avl_backend, options=dict(options), **_compat.isolation())
    # `generate` reads the signature of forward.
    model.forward = functools.wraps(model.forward)(watch(compiled))


def _by_regions(model: nn.Module, options: Mapping[str, Any], watch: Watch) -> None:
    regions.compile(model, options=dict(options))
    # Whatever generate calls: what the model is wrapped in, what it wraps, or (remote code) the decoder alone.
    decoder = find_region(model, "decoder")
    for module in (*wrapping(model), *(() if decoder is None else (decoder.module,))):
        _compat.watch_calls(module, watch)


FRONT_DOORS: Mapping[str, Callable[[nn.Module, Mapping[str, Any], Watch], None]] = {
    "torch.compile": _bare,
    "avl_fx.compile": _by_regions,
}
"""Name -> what compiles a model in place and lets its calls be watched. Undone by `left_untouched`."""


def _unknown_door(name: object) -> OptionError:
    meant = near_miss(name, FRONT_DOORS)
    known = " or ".join(map(repr, FRONT_DOORS))
    return OptionError(
        f"must be {known}, got {show(name)}",
        field="front_door",
        remedy=f"did you mean {meant!r}?" if meant else "give one of them",
    )


# ---- the run -----------------------------------------------------------------------------------------------------


def _drive(result: Run, new_tokens: int, run: Callable[..., Any] | None, inputs: Mapping[str, Any]) -> None:
    """Prefill and decode, by the caller's loop, the stock `generate`, or a single call."""
    model = result.model
    # A cache that was passed in would be filled.
    given = {k: copy.deepcopy(v) if k in _compat.CACHE_NAMES else v for k, v in inputs.items()}
    if run is not None:
        result.generated = True
        run(model, **given)
    elif _has_stock_generate(model) or (result.front_door == "avl_fx.compile" and _generates(model)):
        result.generated = True
        settings = {
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "do_sample": False,
            "return_dict_in_generate": True,
            "disable_compile": True,
        }
        output = model.generate(**{**settings, **given})  # type: ignore[operator]
        result.cache = _compat.cache_of(output)
    else:
        _check_forward(model, given)
        result.goes_past = _generates(model)
        model(**given)


def _has_stock_generate(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can())


def _generates(model: nn.Module) -> bool:
    """Whether ``model`` has a `generate` of its own that may hand settings on to one of transformers (remote code)."""
    generate = getattr(model, "generate", None)
    parameters = inspect.signature(generate).parameters.values() if callable(generate) else ()
    return any(p.kind is p.VAR_KEYWORD for p in parameters) and find_region(model, "decoder") is not None


def _check_forward(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Remote code may take other inputs in `generate` than in its forward, which it never calls."""
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError as error:
        if not _generates(model):
            return  # the forward itself says it
        raise CaptureError(
            f"the forward of {type(model).__name__} does not take them ({error}), and its generate goes past it",
            field="inputs",
            remedy="explain what avl_fx.compile does with it: front_door='avl_fx.compile'",
        ) from error


class _Watch:
    """Stands in for the call of a model and notes what ran since its last call ended.

    Since then, and not since this call began: `generate` encodes images before it calls the model. A call within a
    call, where a wrapper is watched and what it wraps, is one forward.
    """

    def __init__(self, result: Run, call: Callable[..., Any]) -> None:
        self._result, self._call = result, call
        result.noted = time.perf_counter()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._result.calling:
            return self._call(*args, **kwargs)
        self._result.calling = True
        try:
            return self._call(*args, **kwargs)
        finally:
            self._result.calling = False
            self._note()

    def _note(self) -> None:
        now = time.perf_counter()
        counts = [graph.calls for graph in self._result.recorder.graphs]
        known = len(self._result.counts)
        ran = (n - before for n, before in zip(counts, self._result.counts + [0] * (len(counts) - known), strict=True))
        self._result.forwards.append(
            ForwardReport(
                phase="decode" if self._result.forwards else "prefill",
                seconds=now - self._result.noted,
                captured=tuple(range(known, len(counts))),
                graphs={index: n for index, n in enumerate(ran) if n},
            )
        )
        self._result.counts, self._result.noted = counts, now


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of the backend, unless someone chose a level: the report holds what they say."""
    log = logging.getLogger("avl_fx")
    if log.level != logging.NOTSET:
        yield
        return
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(logging.NOTSET)


@contextlib.contextmanager
def _noting(result: Run) -> Iterator[None]:
    try:
        yield
    except CacheStateError as error:
        result.stopped = str(error)


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"a torch.nn.Module can be explained, not {show(model)}",
            field="model",
            remedy="pass the model itself, not its class, its name or its outputs",
        )
