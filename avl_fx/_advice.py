"""What a report advises: each line says what was seen, what it costs, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from avl_fx._advice_reads import READS_RULES, how_to_name_them
from avl_fx._words import WHOLE, ranges
from avl_fx.passes.site import Reason
from avl_fx.plan import Plan
from avl_fx.report import DecodeReads, DecoderReport, GraphReport, KVReport, SiteReport

__all__ = ["Facts", "advise"]

_REMEDIES: dict[Reason, str] = {
    Reason.DROPOUT: "call model.eval()",
    Reason.FLEX: "load the model with attn_implementation='sdpa'",
    Reason.LIBRARY: "load the model with attn_implementation='sdpa', or call torch's scaled_dot_product_attention",
    Reason.WEIGHTS_USED: "drop output_attentions=True",
    Reason.ANCHOR_ELSEWHERE: f"capture the decoder as one graph with {WHOLE}",
    Reason.ANCHOR_KIND: "keep layers of one kind (full, sliding) in a block",
    Reason.ANCHOR_GEOMETRY: "keep layers of one shape in a block",
    Reason.ANCHOR_MASK: "keep layers with one mask in a block",
    Reason.ANCHOR_SCALE: "keep layers with one scale in a block",
    Reason.ANCHOR_REFUSED: "start the block at another layer",
    Reason.NO_CACHE: "without a cache there is nothing to read less of; leave out use_cache=False",
    Reason.POSITION_MASK: "dense under the sections vision and text; sliding windows read few keys anyway",
    Reason.NOT_THE_CACHE: "dense under the sections vision and text, which move rows of the cache itself",
    Reason.LAYER_UNKNOWN: f"capture the decoder as one graph with {WHOLE}",
}


@dataclass(frozen=True)
class Facts:
    """What advice is drawn from."""

    plan: Plan
    front_door: str
    kernels: dict[str, str]
    """As in `Report`."""
    decoder: DecoderReport
    graphs: tuple[GraphReport, ...]
    sites: tuple[SiteReport, ...]
    visual_known: bool
    vision_path: str | None
    """Path of the vision encoder, where the model tells."""
    was_training: bool
    generated: bool
    """Whether the model's own `generate` ran; else it was called once."""
    goes_past: bool
    """Whether a `generate` of its own would have called the decoder past the forward that ran (remote code)."""
    bypassed: str | None
    """The class of what the model wraps, where no forward of the wrapper itself ran."""
    recompile_limit: int
    reads: DecodeReads | None
    kv: KVReport | None
    grows_in_place: bool
    """Whether a decode graph stores its rows in spare room instead of copying the cache."""


def advise(facts: Facts) -> tuple[str, ...]:
    """All advice that applies, the most important first."""
    if facts.bypassed is not None:  # nothing was seen that more could be said of
        return (
            f"The model is a wrapper, and generate calls the {facts.bypassed} inside of it: compile that one, or use "
            f"{WHOLE}, which finds it.",
        )
    rules = (_failures, _kernels, _missing, _pieces, _refusals, *READS_RULES, _vision, _visual, _training, _no_decode)
    return tuple(line for rule in rules for line in rule(facts))


def _failures(facts: Facts) -> Iterator[str]:
    failed = [g.index for g in facts.graphs if g.failure]
    if failed:
        yield (
            f"A pass failed on graph {', '.join(map(str, failed))}, which was compiled as the model wrote it. Please "
            "report it with the files of explain(..., keep_graphs=True).dump(folder)."
        )


def _kernels(facts: Facts) -> Iterator[str]:
    names = [name for name, ran in facts.kernels.items() if name == ran]
    if not names:
        return
    where = f"The model attends in {', '.join(names)}, where no pass sees it"
    if facts.front_door == "avl_fx.compile":
        yield f"{where}, and cannot change that: load it with attn_implementation='sdpa'."
    else:
        yield f"{where}: load it with attn_implementation='sdpa', or use {WHOLE}, which lets it attend so."


def _missing(facts: Facts) -> Iterator[str]:
    expected = facts.decoder.expected
    for phase, layers in facts.decoder.seen.items():
        if expected is None or len(layers) >= expected:
            continue
        what = (
            f"{phase}: {expected} decoder layers expected, {len(layers)} seen. The others run as the model wrote them"
        )
        if facts.front_door == "avl_fx.compile":
            yield f"{what}: their attention was not captured, or is of a kind that is not recognised."
        else:
            yield f"{what}; {WHOLE} captures the decoder by itself."


def _pieces(facts: Facts) -> Iterator[str]:
    phases = {phase: graphs for phase, graphs in facts.decoder.graphs.items() if graphs > 1}
    if not phases:
        return
    phase, graphs = next(iter(phases.items()))
    layers = len(facts.decoder.seen.get(phase, ()))
    each = "one each" if graphs == layers else "a part each"
    expected = facts.decoder.expected
    start = f"{phase}: {layers if expected is None else expected} decoder layers expected, {graphs} graphs hold {each}"
    remedy = f"use {WHOLE}" if facts.front_door != "avl_fx.compile" else "see the graph breaks above"
    yield f"{start}, and a lazy block cannot reach across graphs: {remedy}."
    if graphs > facts.recompile_limit:
        yield (
            f"Dynamo stops compiling a function after {facts.recompile_limit} graphs (explain lifted that limit): in a "
            f"real run the layers beyond run eagerly. Use {WHOLE}, or raise torch._dynamo.config.recompile_limit."
        )


def _refusals(facts: Facts) -> Iterator[str]:
    refused: dict[str, list[SiteReport]] = {}
    for site in facts.sites:
        if site.status == "refused" and site.reason:
            refused.setdefault(site.reason, []).append(site)
    for reason, sites in sorted(refused.items(), key=lambda item: -len(item[1])):
        remedy = next((text for known, text in _REMEDIES.items() if str(known) == reason), None)
        layers = ranges(s.layer for s in sites if s.layer is not None)
        where = f"Layers {layers} of {sites[0].tower}" if layers else f"{len(sites)} attention calls"
        yield f"{where} refused ({reason}): {remedy or 'exact and dense, as the model wrote it'}."


def _vision(facts: Facts) -> Iterator[str]:
    path = facts.vision_path
    if not path or any(_within(site.module_path, path) for site in facts.sites):
        return
    if facts.front_door == "avl_fx.compile":
        yield f"No attention of the vision encoder {path} was captured: see the graph breaks above."
    else:
        why = "generate calls it outside of forward" if facts.generated else "see the graph breaks above"
        yield f"The vision encoder {path} ran eagerly ({why}): {WHOLE} compiles it too."


def _visual(facts: Facts) -> Iterator[str]:
    if not facts.visual_known and facts.reads is None:  # else a rule for what decode steps read says it
        yield (
            "No visual positions were found: policies for visual keys would not apply. If the prompt has images, "
            f"{how_to_name_them(facts)}."
        )


def _training(facts: Facts) -> Iterator[str]:
    if facts.was_training:
        yield "The model is in training mode; explain ran it in eval mode. Call model.eval() before you generate."


def _no_decode(facts: Facts) -> Iterator[str]:
    if facts.goes_past:
        yield (
            "Only one forward ran: generate calls the decoder past it, where torch.compile sees nothing. "
            f"{WHOLE} does; explain(..., front_door='avl_fx.compile') shows decode steps."
        )
    elif not facts.generated and "decode" not in facts.decoder.seen:
        yield (
            "Only one forward ran, for want of a stock generate: pass explain(..., run=lambda model, **inputs: ...) "
            "with your own loop to see decode steps."
        )


def _within(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")
