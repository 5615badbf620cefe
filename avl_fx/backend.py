"""`avl_backend`: what `torch.compile(model, backend="avl")` calls for every captured graph."""

from __future__ import annotations

import functools
import logging
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from avl_fx import _compat
from avl_fx.attention_kernels import opaque_kernels, warn_of_hidden_attention
from avl_fx.errors import AvlError, CacheStateError, InternalError
from avl_fx.modality import audio_masks, carried, given, may_carry
from avl_fx.observe import active_observer
from avl_fx.options import BackendOptions, parse_options
from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import alias_root, arg, hint, op, shape, writes_to
from avl_fx.passes.pipeline import run_stages
from avl_fx.passes.share_queries import decoder_sites
from avl_fx.passes.site import Site, Status
from avl_fx.plan import Plan
from avl_fx.record import GraphRecord, active_recorder
from avl_fx.region_call import note_pieces, region_decoder
from avl_fx.runtime import CompiledGraph
from avl_fx.token_ids import audio_token_ids

__all__ = ["avl_backend"]

log = logging.getLogger("avl_fx")


def avl_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The torch.compile backend: rewrite the attention of ``gm`` after a plan, hand the result to Inductor.

    Args:
        gm: a graph captured by Dynamo.
        example_inputs: its inputs, fake or real.
        mode: an Inductor mode, as in ``torch.compile(mode=...)``.
        options: ``plan`` (`Plan`, dict, path or preset name; default: identity), ``strict`` (raise when a pass fails
            instead of compiling the untouched graph), ``inductor`` (dict of Inductor config patches), ``compiler``
            (``inductor``, ``aot_eager`` or ``eager``), ``mode`` and ``dump`` (folder for graphs before and after).

    Raises:
        OptionError: an unknown or malformed option.
        PlanError: a plan that is wrong, does not fit the model, or cannot be executed by this version.
        InternalError: a pass failed and ``strict`` is set.
    """
    parsed = parse_options(mode, options)
    parsed.plan.check_supported()
    return _compile_graph(gm, example_inputs, parsed)


def _compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions) -> Callable[..., Any]:
    recorder = active_recorder()
    record = GraphRecord(index=len(recorder.graphs) if recorder else 0, nodes_before=len(gm.graph.nodes))
    record.linears["before"], record.linear_flops["before"] = _linears(gm)
    keep_text = options.dump is not None or (recorder is not None and recorder.keep_graphs)
    if keep_text:
        record.before = _compat.readable(gm)
    frame = _compat.frame_modules().outermost()
    record.frame = None if frame is None else weakref.ref(frame)
    ctx = _make_context(gm, example_inputs, options)
    start = time.perf_counter()
    past = _past_rows(gm)
    untouched, gm = gm, _compat.copy_module(gm)
    try:
        record.passes = run_stages(gm, ctx)
        _check_depth(ctx, options)
        _check_cache(ctx, options)
    except AvlError:
        raise
    except Exception as error:
        if options.strict:
            raise InternalError(
                f"a pass failed: {error}", remedy="report it with the graph (options={'dump': folder}), or drop strict"
            ) from error
        log.warning("a pass failed, the untouched graph is compiled instead: %s", error, exc_info=True)
        record.failure = f"{type(error).__name__}: {error}"
        gm = untouched
        ctx = _make_context(gm, example_inputs, options)
    record.pass_seconds = time.perf_counter() - start
    _notice_pieces(ctx, options)
    if frame is not None and not ctx.sites and record.linears["before"] and options.plan != Plan.identity():
        for kernel in opaque_kernels(frame):
            warn_of_hidden_attention(kernel, str(options.plan))
    record.sites, record.dropped_keys = ctx.sites, ctx.dropped_keys
    record.visual = "none" if ctx.visual is None else ctx.visual.how
    record.expected_layers = ctx.expected_layers
    record.nodes_after = len(gm.graph.nodes)
    left = None if ctx.prompt_filter is None else (ctx.prompt_filter.left, _tokens_left(ctx))
    record.linears["after"], record.linear_flops["after"] = _linears(gm, left)
    dense_keys = _dense_keys(gm, ctx) if record.failure is None else tuple((i, None) for i in _cached(gm, past))
    hidden = [position for position, tensor in enumerate(example_inputs) if may_carry(tensor)]
    if keep_text:
        record.after = _compat.readable(gm)
    if options.dump is not None:
        _dump(record, options)
    _log_sites(record)
    start = time.perf_counter()
    compiled = _compat.compile_graph(gm, example_inputs, options.compiler, options.inductor_config())
    record.compile_seconds = time.perf_counter() - start
    if recorder is not None:
        recorder.graphs.append(record)
    return CompiledGraph.of(compiled, ctx, record, dense_keys, past, hidden)


def _make_context(gm: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions) -> PassContext:
    resolver = _compat.frame_modules()
    region = region_decoder()
    visual = None
    if given() is not None:
        visual = "given"
    elif carried(example_inputs) is not None:
        visual = "carried"
    return PassContext(
        plan=options.plan,
        resolve_module=resolver.module,
        expected_layers=resolver.decoder_layers(),
        without_attention=resolver.without_attention(),
        decoder_modules=resolver.decoder_modules() if region is None else region,
        carried_visual=visual,
        audio_ids=audio_token_ids(getattr(resolver.outermost(), "config", None)),
        audio_masks=audio_masks(example_inputs),
        observe=active_observer() is not None,
        # CUDA graphs copy their inputs into memory of their own, without what lies behind their end.
        spare_rows=not options.inductor_config().get("triton.cudagraphs", False),
    )


def _check_depth(ctx: PassContext, options: BackendOptions) -> None:
    """A plan for another depth is an error as soon as a graph shows how deep the decoder is."""
    depth = ctx.expected_layers
    if depth is None:
        depths = {s.depth for s in decoder_sites(ctx) if s.depth is not None}
        depth = depths.pop() if len(depths) == 1 else None
    if depth is not None and decoder_sites(ctx):
        options.plan.check_depth(depth)


def _check_cache(ctx: PassContext, options: BackendOptions) -> None:
    """A compact cache stores what its own plan keeps; another plan may read what it dropped."""
    if ctx.compact is not None and ctx.compact.plans != {options.plan.fingerprint()}:
        raise CacheStateError(
            f"this AVLCache was made for another plan than the model is compiled with ({options.plan})",
            field="cache",
            remedy="write AVLCache(plan, model.config) with the plan of avl_fx.compile or of the backend's options",
        )


def _notice_pieces(ctx: PassContext, options: BackendOptions) -> None:
    """Make room for the pieces of a decoder, and say when some of its layers may run densely, unseen."""
    sites = decoder_sites(ctx)
    if not sites:
        return
    layers, expected = {s.layer for s in sites}, ctx.expected_layers or sites[0].depth
    attending = None if expected is None else expected - len(ctx.without_attention)
    by_region = region_decoder() is not None
    if attending is not None and len(layers) < attending:
        factor = note_pieces(-(-attending // len(layers)))
        if factor > 1:
            _compat.raise_recompile_limits(factor)
        if not options.plan.is_lossless:
            warn_of_pieces(len(layers), attending, by_region, str(options.plan))
    if options.plan.is_lossless:
        return
    if not by_region and _compat.is_last_recompile():
        log.warning(
            "Dynamo compiles this frame for the last time (torch._dynamo.config.recompile_limit) and will run new "
            "shapes eagerly, where the keys of lazy layers are missing and logits become NaN. Raise the limit, mark "
            "dimensions dynamic, or use avl_fx.compile(model, plan=...), which raises instead."
        )


@functools.cache
def warn_of_pieces(layers: int, expected: int, by_region: bool, plan: str) -> None:
    """Say, once and not for each piece, that a decoder was captured in pieces of so many ``layers``."""
    log.warning(
        "a graph holds %d of %d decoder layers; lazy layers whose anchor is in another graph stay dense (%s). %s",
        layers,
        expected,
        plan,
        "TORCH_LOGS=graph_breaks tells what breaks the decoder into pieces."
        if by_region
        else "avl_fx.compile(model, plan=...) captures the decoder as one graph.",
    )


def _dense_keys(gm: fx.GraphModule, ctx: PassContext) -> tuple[tuple[int, int | None], ...]:
    """Inputs that hold cached keys and are attended to by a site that is not lazy."""
    inputs = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    found: dict[int, int | None] = {}
    for site in ctx.sites:
        if site.role != "decoder" or site.cache == "none" or site.node is None or _reads_no_own_keys(site, ctx):
            continue
        for source in _cached_inputs(site.node):
            if source in inputs:
                found.setdefault(inputs[source], site.layer)
    return tuple(sorted(found.items(), key=lambda item: item[0]))


def _reads_no_own_keys(site: Site, ctx: PassContext) -> bool:
    policy = ctx.plan.lazy_policy
    return site.anchor is not None and policy is not None and policy.mode == "gla"


def _past_rows(gm: fx.GraphModule) -> tuple[int, ...]:
    """Inputs ``[batch, kv_heads, keys, dim]`` that the graph appends to, as a DynamicCache does."""
    inputs = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    grown = (n.args[0] for n in gm.graph.nodes if op(n) == "cat" and isinstance(n.args[0], tuple | list))
    firsts = (alias_root(parts[0]) for parts in grown if len(parts) == 2 and isinstance(parts[0], fx.Node))
    return tuple(sorted({inputs[n] for n in firsts if n in inputs and len(shape(n) or ()) == 4}))


def _cached(gm: fx.GraphModule, past: tuple[int, ...]) -> tuple[int, ...]:
    """Inputs that may hold cached keys, where no pass said which ones do: those that are appended or written to."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return past + tuple(i for i, n in enumerate(inputs) if len(shape(n) or ()) == 4 and writes_to(n))


def _cached_inputs(attention: fx.Node) -> list[fx.Node]:
    if op(attention) in ("contiguous", "getitem"):  # what lowering put behind the attention itself
        attention = attention.args[0]  # type: ignore[assignment]
    place = 2 if op(attention) == "inherited_decode" else 1
    key = attention.args[place] if len(attention.args) > place else None
    if not isinstance(key, fx.Node):
        return []
    root = alias_root(key)
    if op(root) == "cat":
        return [alias_root(n) for n in root.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
    return [root]


def _tokens_left(ctx: PassContext) -> int | None:
    """How many positions a prompt has left, of those that the graph was captured with; ``None``: not known yet."""
    visual = given()
    if visual is None or ctx.prompt_filter is None:
        return None
    counts = visual.sum(1).tolist()
    return visual.shape[1] - min(n - int(ctx.prompt_filter.keep * n) for n in counts)


def _linears(gm: fx.GraphModule, left: tuple[Any, int | None] | None = None) -> tuple[int, int]:
    """Matmuls with a weight: their number, and their FLOPs at the sizes that the graph was captured with.

    ``left``: a size that depends on data, and what it was then.
    """
    nodes = [n for n in gm.graph.nodes if op(n) in ("linear", "narrow_linear")]
    return len(nodes), sum(_linear_flops(node, left) for node in nodes)


def _linear_flops(node: fx.Node, left: tuple[Any, int | None] | None) -> int:
    """Two for each element of the output and each input feature; 0 where a size depends on data."""
    output, source = shape(node), shape(arg(node, 0, "input"))
    sizes = [
        left[1] if left is not None and str(s) == str(left[0]) else hint(s)
        for s in (*(output or ()), *(source or ())[-1:])
    ]
    return math.prod(map(int, sizes)) * 2 if output and source and None not in sizes else 0  # type: ignore[arg-type]


def _dump(record: GraphRecord, options: BackendOptions) -> None:
    folder = options.dump
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("graph_*_before.py")))
    (folder / f"graph_{number:03d}_before.py").write_text(record.before or "", encoding="utf-8")
    (folder / f"graph_{number:03d}_after.py").write_text(record.after or "", encoding="utf-8")


def _log_sites(record: GraphRecord) -> None:
    for site in record.sites:
        where = site.module_path or "?"
        if site.status is Status.REFUSED:
            log.info("site %s (%s) refused: %s %s", site.index, where, site.reason, site.detail)
        else:
            log.debug("site %s (%s): %s", site.index, where, site.action)
    for result in record.passes:
        log.info(
            "pass %s: %d, refused %s, %.1f ms", result.name, result.count, dict(result.refused), result.seconds * 1e3
        )
