"""The questions: what happens to one model under one plan, in a few words that are checked before they are said.

An answer is `exact` where every decoder layer did what the plan asks for and logits equal the oracle's. Layers that
stayed dense are counted, with the reason that they gave, and the oracle leaves the same layers dense: what is said and
what is computed cannot differ. `told`: nothing shows which positions are visual; without `modality_ids` the answer was
the dense one. Where a model says that it cannot be run in some way by itself (no static cache, say),
that way is not asked for.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import avl_fx
from avl_fx import AVLCache, Plan
from avl_fx.passes.site import Site, Status
from avl_fx.record import Recorder
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.oracle import avl_oracle, lazy_oracle
from tests.zoo import ZooModel
from tests.zoo._run import Run, prefill_and_decode

STEPS = 7
"""Crosses two refreshes."""
SHARES = {"core": 0.3, "secondary": 0.5, "refresh": 3}
KEPT = 0.6
"""Share of the visual tokens that the filter keeps."""


def prompts(zoo: ZooModel, model: nn.Module) -> dict[str, Any]:
    """Three rows, padded where the model can be."""
    return zoo.inputs(model, batch=3 if zoo.padding_exact else 1)


def identity(zoo: ZooModel, door: str) -> str:
    """The plan that leaves nothing out, on every cache that the stock model takes."""
    model = zoo.make()
    inputs = prompts(zoo, model)
    found = set()
    for cache in zoo.caches:
        eager = prefill_and_decode(model, inputs, cache, steps=4)
        with through(door, model, compiler="eager") as recorder:
            got = prefill_and_decode(model, inputs, cache, steps=4, tokens=eager.tokens)
        _same(got, eager)
        found.add(_said(zoo, recorder, lambda site: site.status is Status.REWRITTEN))
    return "; ".join(sorted(found))


def lazy(zoo: ZooModel, mode: str) -> str:
    """All layers but the first inherit from it, or from the first of their kind."""
    model = zoo.make()
    inputs = prompts(zoo, model)
    visual = zoo.visual_positions(model, inputs)
    blocks = [(_first_full(zoo), zoo.decoder_layers - 1)]
    dense = prefill_and_decode(model, inputs, "dynamic", steps=STEPS)
    got, recorder, told = _under(model, Plan.lazy(blocks, mode), inputs, visual, dense, "dynamic", asks=mode != "gla")
    done = lambda site: site.action.startswith("lazy") and site.status is Status.REWRITTEN  # noqa: E731
    expected = dense
    if _layers(recorder, done):
        kinds = _kinds(zoo, recorder, lambda site: done(site) or site.layer <= blocks[0][0])
        with lazy_oracle(model, blocks, zoo.decoder_prefix, kinds, mode, visual):
            expected = prefill_and_decode(model, inputs, "dynamic", steps=STEPS, tokens=dense.tokens)
    _same(got, expected)
    return told + _said(zoo, recorder, done, lambda site: site.layer > blocks[0][0])


def partitioned(zoo: ZooModel, cache: str, text: float | None = None, keep: float = 1.0) -> str:
    """A-VL on one of the caches; ``keep`` < 1 filters the prompt behind its first layer as well."""
    model = zoo.make()
    inputs = prompts(zoo, model)
    visual = zoo.visual_positions(model, inputs)
    shares: dict[str, Any] = {**SHARES, "text": text, "text_minimum": 4}
    if keep < 1:
        shares |= {"prefill": keep, "prefill_after_layer": 0}
    plan = Plan.avl(**shares)
    stock = "dynamic" if cache == "compact" else cache
    dense = prefill_and_decode(model, inputs, stock, steps=STEPS)
    got, recorder, told = _under(model, plan, inputs, visual, dense, cache, asks=bool(visual.any()))
    done = lambda site: "partitioned" in site.action and site.status is Status.REWRITTEN  # noqa: E731
    filtered = {s.layer for s in decoder_sites(decoder_graphs(recorder)[0]) if "of the visual tokens" in s.action}
    settings: dict[str, Any] = {**SHARES, "text": text or 1.0, "minimum": 4, "shares": zoo.shares}
    if filtered:
        assert filtered == set(range(1, zoo.decoder_layers)), "the filter took some of the layers behind it"
        settings |= {"prefill": keep, "after": 0}
    expected = dense
    if _layers(recorder, done):
        kinds = _kinds(zoo, recorder, done)
        with avl_oracle(model, visual, decoder_prefix=zoo.decoder_prefix, kinds=kinds, **settings):
            expected = prefill_and_decode(model, inputs, stock, steps=STEPS, tokens=dense.tokens)
    _same(got, expected)
    said = _said(zoo, recorder, done)
    if keep < 1 and not filtered:
        sites = (site for graph in decoder_graphs(recorder) for site in decoder_sites(graph))
        whole = {site.action.partition("; all tokens: ")[2] for site in sites} - {""}
        return f"all tokens: {told}{'; '.join(sorted(whole)) or said}"
    return told + said


QUESTIONS: dict[str, Callable[[ZooModel], str]] = {
    "identity, `avl_fx.compile`": lambda zoo: identity(zoo, DOORS[0]),
    "identity, `torch.compile`": lambda zoo: identity(zoo, DOORS[1]),
    "lazy, `gla`": lambda zoo: lazy(zoo, "gla"),
    "lazy, `vla_scores`": lambda zoo: lazy(zoo, "vla_scores"),
    "A-VL, stock cache": lambda zoo: partitioned(zoo, "dynamic"),
    "A-VL, `AVLCache`, text window": lambda zoo: partitioned(zoo, "compact", text=0.5),
    "A-VL, prompt filtered": lambda zoo: partitioned(zoo, "compact", keep=KEPT),
}
"""Column of the table -> the answer for a model."""


def _under(
    model: nn.Module, plan: Plan, inputs: dict[str, Any], visual: Tensor, dense: Run, cache: str, asks: bool
) -> tuple[Run, Recorder, str]:
    """A run of ``model`` under ``plan``; where it ``asks`` for visual positions and nobody knows them, it is told."""
    for told in (False, True):
        past = AVLCache(plan, model.config) if cache == "compact" else cache
        knows = avl_fx.modality_ids(visual) if told else contextlib.nullcontext()
        with knows, through("avl_fx.compile", model, compiler="eager", plan=plan) as recorder:
            got = prefill_and_decode(model, inputs, past, steps=STEPS, tokens=dense.tokens)
        if recorder.visual or not asks:
            break
        if not told:
            _same(got, dense)  # unknown means dense
    return got, recorder, "told, " if told else ""


def _same(got: Run, expected: Run) -> None:
    worst = largest(got, expected)
    assert worst <= FLOAT32_TOLERANCE, f"logits differ by {worst:.3g}"


def _first_full(zoo: ZooModel) -> int:
    return next((i for i, kind in enumerate(zoo.attention_kinds) if kind == "full"), 0)


def _layers(recorder: Recorder, done: Callable[[Site], bool]) -> set[int | None]:
    return {site.layer for graph in decoder_graphs(recorder) for site in decoder_sites(graph) if done(site)}


def _kinds(zoo: ZooModel, recorder: Recorder, done: Callable[[Site], bool]) -> list[str]:
    """For the oracle: a layer is what the model says if the plan was done there, else something it leaves alone."""
    layers = _layers(recorder, done)
    return [kind if layer in layers else "dense" for layer, kind in enumerate(zoo.attention_kinds)]


def _said(
    zoo: ZooModel, recorder: Recorder, done: Callable[[Site], bool], asked: Callable[[Site], bool] = lambda site: True
) -> str:
    """`exact`, or how many of the attention layers did it and why the others did not."""
    assert all(graph.failure is None for graph in recorder.graphs), [graph.failure for graph in recorder.graphs]
    seen = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph)]
    sites = [site for site in seen if asked(site)]
    layers = {site.layer for site in sites}
    dense = {site.layer: site.reason for site in sites if not done(site)}
    expected = [i for i, kind in enumerate(zoo.attention_kinds) if kind != "none"]
    unseen = len({*expected} - {site.layer for site in seen})
    why = sorted({str(reason or "not asked for") for reason in dense.values()})
    if unseen:
        why.append(f"{unseen} of {len(expected)} layers have no graph of their own")
    if not why:
        return "exact"
    return f"{len(layers) - len(dense)} of {len(layers) + unseen}: {'; '.join(why)}"


@torch.no_grad()
def answers(zoo: ZooModel) -> dict[str, str]:
    """Every question's answer; a failed one says so."""
    found = {}
    for question, ask in QUESTIONS.items():
        try:
            found[question] = ask(zoo)
        except Exception as error:  # the table is for those who mend it, too
            first = (str(error).strip() or "-").splitlines()[0]
            found[question] = f"FAILS: {type(error).__name__}: {first[:150]}"
    return found
