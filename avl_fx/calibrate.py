"""`calibrate`: watch a model attend to prompts, and choose the blocks of layers that may share queries and keys.

Sources: Q Cache / Lazy Attention (arXiv 2602.01901, section 3: layers whose last attention rows are alike) and A-VL
(arXiv 2409.14846, section 3: few visual keys hold most of the visual attention).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from avl_fx import _compat, regions
from avl_fx._calibration_picture import need_matplotlib
from avl_fx._findings import Findings, fingerprint, load, save
from avl_fx._messages import quote, show
from avl_fx._planfile import reason
from avl_fx._progress import progress_bar
from avl_fx._prompt_rows import check_batch, prompt_rows
from avl_fx._targets import Target
from avl_fx._untouched import left_untouched
from avl_fx.backend import avl_backend
from avl_fx.calibration_report import CalibrationReport, proposed_ratios, stored_bytes
from avl_fx.errors import CalibrationError, UnsupportedPlanError
from avl_fx.observe import Observer, observing
from avl_fx.options import parse_options
from avl_fx.plan import Plan

__all__ = ["MODES", "calibrate", "calibrated"]

MODES = ("gla", "vla", "vla_scores")
"""Modes of a lazy plan."""

log = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    epsilon: float | None = None,
    lazy_share: float | None = None,
    kv_saving: float | None = None,
    max_divergence: float | None = None,
    mode: Literal["gla", "vla", "vla_scores"] = "gla",
    vision: bool = False,
    limit: int | None = None,
    compiler: str = "eager",
    state: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """Run ``model`` on prompts and return a plan whose lazy blocks hold layers that attend alike.

    ::

        batches = (processor(images=image, text=text, return_tensors="pt") for image, text in samples)
        plan = avl_fx.calibrate(model, batches, lazy_share=0.4, report="calibration/")

    How alike two layers are is the Jensen-Shannon divergence (natural logarithm: 0 to ln 2 = 0.693 nats) of the
    attention rows of each prompt's last token, averaged over query heads and samples. Layers of another kind (sliding
    window, cross-attention) or geometry never share a block. Memory does not grow with the number of batches.

    The model runs for real, one forward a batch, captured by `avl_fx.compile` under the identity plan, by default
    without code generation. It is left exactly as it was: its forward, hooks, compiled code, training flag, and the
    random generators.

    Args:
        model: any vision-language model whose decoder `avl_fx.compile` captures as one graph.
        batches: keyword arguments of ``model(...)``, one mapping a batch; each holds visual tokens. A generator may
            yield inside ``with avl_fx.modality_ids(ids):`` where the model does not show which they are. It is closed
            at the end.
        epsilon: target 1, the rule of the paper: walks the layers once; a layer whose divergence from the layer before
            is below this (nats) joins its block. Notices no drift within a block.
        lazy_share: target 2: so large a share of all decoder layers is lazy, or just more; ``0 < share < 1``.
        kv_saving: target 3: so large a share of the KV bytes of the layers that were observed is saved, or just more. A
            lazy layer saves its keys: half of its bytes where keys and values are equally wide.
        max_divergence: target 4: as many lazy layers as possible, while their divergences from their anchors add up to
            this at most (nats). Targets 2 to 4 find the blocks of the smallest sum exactly.
        mode: what lazy layers inherit, see `LazyPolicy`; recorded in the plan. Layers with a sliding window are lazy in
            mode ``gla`` alone.
        vision: add a section ``vision``: the shares of visual keys that hold 80% (core) and 95% (secondary) of the
            visual attention.
        limit: batches to run at most, those in ``state`` included.
        compiler: what compiles the graphs: ``"eager"``, ``"aot_eager"`` or ``"inductor"``.
        state: file that everything summed up so far is written to after every batch. Starting again with it and the
            same batches goes on behind the last one; the result is that of an uninterrupted run, bit for bit where
            ``compiler`` is ``"eager"``. Another target needs no new run.
        report: folder for ``plan.json``, ``report.json``, ``similarity.png`` and ``report.html``.
        progress: show a bar on stderr, where that is a terminal.

    Returns:
        The plan; the identity, with a warning, where no layer meets ``epsilon`` or ``max_divergence``.

    Raises:
        CalibrationError: not exactly one target, or one out of range or out of reach; a batch from which nothing can be
            learned; a decoder that cannot be observed; a state of another model; a folder that cannot be written to.
        OptionError: ``compiler`` is wrong.

    Whatever the model or the iterator raises is passed on.
    """
    targets = {
        "epsilon": epsilon,
        "lazy_share": lazy_share,
        "kv_saving": kv_saving,
        "max_divergence": max_divergence,
    }
    found = calibrated(
        model,
        batches,
        targets,
        mode=mode,
        vision=vision,
        limit=limit,
        compiler=compiler,
        state=state,
        report=report,
        progress=progress,
    )
    for warning in found.warnings:
        log.warning("%s", warning)
    return found.plan


def calibrated(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: Mapping[str, float | None],
    *,
    mode: Literal["gla", "vla", "vla_scores"] = "gla",
    vision: bool = False,
    limit: int | None = None,
    compiler: str = "eager",
    state: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """As `calibrate`, with everything that was found out; ``targets`` are its four by name."""
    model = _compat.uncompiled(model)
    target = Target.of(targets)
    _check_arguments(model, batches, mode, limit)
    if target.name == "kv_saving" and mode != "gla":
        raise CalibrationError(
            f"what mode {mode!r} saves depends on the prompt: its lazy layers store keys of text",
            field="kv_saving",
            remedy="use mode 'gla', or lazy_share",
        )
    parse_options(None, {"compiler": compiler})
    if report is not None:
        need_matplotlib()
        _check_folder(report)
    saved = None if state is None else Path(os.path.expanduser(state))
    findings = _watch(model, batches, limit, compiler, saved, progress)
    result = _choose(findings, target, mode, vision, type(model).__name__)
    if report is not None:
        result.dump(report)
    return result


# ---- the run -----------------------------------------------------------------------------------------------------


def _watch(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    limit: int | None,
    compiler: str,
    state: Path | None,
    progress: bool,
) -> Findings:
    """Sum up what all batches show, going on behind those that ``state`` holds."""
    mark = "" if state is None else fingerprint(model, compiler)
    findings = None if state is None else load(state, mark)
    done = 0 if findings is None else findings.batches
    if limit is not None and done > limit:
        raise CalibrationError(
            f"the state holds {done} batches, more than limit = {limit}",
            field="limit",
            remedy="raise the limit, or use another state",
        )
    seen = 0
    sizes = [limit, len(batches) if isinstance(batches, Sized) else None]
    total = min((size for size in sizes if size is not None), default=None)
    with (
        _instrumented(model, compiler) as observer,
        _drawn(batches) as drawn,
        progress_bar("calibrating", progress, total, done) as step,
    ):
        for number, batch in enumerate(itertools.islice(drawn, limit)):
            seen += 1
            if number < done:
                continue
            prompt = prompt_rows(model, observer, check_batch(model, batch, number), number)
            findings = Findings.of(prompt) if findings is None else findings
            findings.add(prompt)
            if state is not None:
                save(findings, state, mark)
            step()
    if findings is None:
        raise CalibrationError("there are none", field="batches", remedy="give at least one; iterators run only once")
    if seen < done:
        raise CalibrationError(
            f"the state holds {done} batches, there are only {seen}",
            field="state",
            remedy="give the batches that it was made of and those that follow, or use another state",
        )
    return findings


@contextlib.contextmanager
def _instrumented(model: nn.Module, compiler: str) -> Iterator[Observer]:
    """For the block, prompts that ``model`` runs hand on their attention rows."""
    options = {"plan": Plan.identity(), "compiler": compiler, "strict": True}
    # A new callable each time: Dynamo would reuse the code of an earlier, equal backend, in which nothing is observed.
    backend = functools.partial(avl_backend, options=options)
    with left_untouched(model), _compat.fresh_compilation(backend, model), torch.no_grad(), observing() as observer:
        regions.compile(model, options=options)
        yield observer


@contextlib.contextmanager
def _drawn(batches: Iterable[Mapping[str, Any]]) -> Iterator[Iterator[Mapping[str, Any]]]:
    """An iterator over ``batches``; a generator is closed behind it.

    One that is left inside `modality_ids` would take back the positions of somebody else when it is collected.
    """
    drawn = iter(batches)
    try:
        yield drawn
    finally:
        if isinstance(drawn, Generator):
            drawn.close()


# ---- the choice --------------------------------------------------------------------------------------------------


def _choose(
    findings: Findings, target: Target, mode: Literal["gla", "vla", "vla_scores"], vision: bool, model: str
) -> CalibrationReport:
    layers = findings.statistics.layers
    matrix = findings.statistics.mean_divergence()
    if mode != "gla":
        _part_windows(matrix, findings)
    blocks = target.blocks(matrix, *stored_bytes(findings))
    warnings = []
    note = f"calibrated on {findings.statistics.samples} prompts of {model}, {target}"
    plan = Plan.lazy(blocks, mode, layers, description=note) if blocks else Plan(num_layers=layers, description=note)
    if not blocks:
        nearest = min(matrix[n - 1][n] for n in range(1, layers))
        able = f"differ by {nearest:.3g} nats or more" if math.isfinite(nearest) else "may not share a block"
        warnings.append(f"no layer is lazy under {target}: neighbouring layers {able}")
    if vision:
        ratios = proposed_ratios(findings)
        if ratios is None:
            raise CalibrationError(
                "no layer attends to all keys and to visual ones among them",
                field="vision",
                remedy="drop it: this model's visual keys cannot be partitioned",
            )
        plan = plan.combine(Plan.avl(ratios.core, ratios.secondary, text=None, num_layers=layers))
    try:
        plan.check_supported()
    except UnsupportedPlanError as error:
        warnings.append(error.message)
    if findings.excluded:
        reasons = "; ".join(f"layer {n}: {why}" for n, why in sorted(findings.excluded.items()))
        warnings.append(f"not observed, and in no block: {reasons}")
    return CalibrationReport.of(findings, target, blocks, plan, model, warnings)


def _part_windows(matrix: list[list[float]], findings: Findings) -> None:
    """Layers that do not attend to all keys inherit nothing at visual positions: `share_queries` refuses them."""
    for layer, row in enumerate(matrix):
        if layer in findings.layers and findings.layers[layer].kind != "full":
            for other in range(len(row)):
                if other != layer:
                    row[other] = matrix[other][layer] = math.inf


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_arguments(model: object, batches: object, mode: object, limit: object) -> None:
    if not isinstance(model, nn.Module):
        raise CalibrationError(
            f"a torch.nn.Module can be calibrated, not {show(model)}",
            field="model",
            remedy="pass the model itself, not its class, its name or its outputs",
        )
    if isinstance(batches, Mapping | str | bytes | torch.Tensor) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"must be an iterable of batches, got {show(batches)}",
            field="batches",
            remedy="put a single batch into a list: [batch]" if isinstance(batches, Mapping) else "give a list",
        )
    if mode not in MODES:
        raise CalibrationError(
            f"must be {', '.join(MODES[:-1])} or {MODES[-1]}, got {show(mode)}", field="mode", remedy="give 'gla'"
        )
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise CalibrationError(f"must be an int of at least 1, got {show(limit)}", field="limit", remedy="give 100")


def _check_folder(folder: str | os.PathLike[str]) -> None:
    """Find out before the run."""
    try:
        Path(os.path.expanduser(folder)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CalibrationError(
            f"cannot make the folder {quote(folder)}: {reason(error)}",
            field="report",
            remedy="name a folder that you may write to",
        ) from error
