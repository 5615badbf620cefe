"""From what the runtime noted of a partitioned cache to figures: what a decode step reads, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from avl_fx.plan import Plan
from avl_fx.policies import TextPolicy, VisionPolicy
from avl_fx.reads import PromptRow, mean_over_period, rows_read, text_kept, visual_kept
from avl_fx.record import DecodeStep, Recorder, Undivided
from avl_fx.report import DecodeReads, ForwardReport, LayerReads, RowReads, SiteReport, StepCost, StepCosts
from avl_fx.savings import attention_flops, key_bytes

__all__ = ["decode_reads", "is_partitioned", "step_cost"]

LATER = (256, 1024)
"""Tokens after which the figures are given once more."""


def is_partitioned(site: SiteReport) -> bool:
    """Whether what a site's decode steps read depends on the state of the cache: under the plan's sections ``vision``
    and ``text``, and where logits against visual keys are inherited."""
    return "partitioned" in site.action or site.inherits == "visual"


def decode_reads(
    plan: Plan, recorder: Recorder, forwards: Sequence[ForwardReport], decoder: Sequence[SiteReport]
) -> DecodeReads | None:
    """What decode steps read at the length of the run's last step over a partitioned cache.

    Args:
        plan: of the run.
        recorder: of the run.
        forwards: of the run, in order.
        decoder: the sites of its language decoder.

    Returns:
        ``None`` where no cache was to be partitioned.
    """
    if not recorder.divisions or not plan.tracks_visual:
        return None
    division = recorder.divisions[-1]
    vision, text = plan.vision_policy, plan.text_policy
    if vision is not None and vision.is_identity:  # core is all there is, or every step reads all
        vision = None
    refresh = 0 if vision is None else vision.refresh
    steps = _steps(recorder, decoder)
    counts = dict(Counter("secondary" if vision is None and step.number else step.reads for step in steps))
    last = next((step for step in reversed(steps) if step.number), None)
    if last is None or isinstance(division, Undivided):
        why = str(division) if isinstance(division, Undivided) else None
        return DecodeReads(counts, why, refresh, 0, (), (), None, {})
    sites = _sites_of(last, forwards, decoder)
    now = _Step(vision, text, division, last)
    layers = tuple(LayerReads(s.layer, is_partitioned(s), now.costs(s)) for s in sites)
    fixed = any(site.cache == "static" for site in sites)
    return DecodeReads(
        steps=counts,
        undivided=None,
        refresh_every_steps=refresh,
        keys=max(now.keys(site) for site in sites if is_partitioned(site)),
        rows=tuple(map(now.row, division)),
        layers=layers,
        total=_sum([layer.costs for layer in layers]),
        later={} if fixed else {n: _sum([replace(now, later=n).costs(site) for site in sites]) for n in LATER},
    )


def _steps(recorder: Recorder, decoder: Sequence[SiteReport]) -> list[DecodeStep]:
    """The decode steps in order, each once: a decoder in pieces notes a step in each of its graphs."""
    sites = [s for s in decoder if is_partitioned(s) and s.queries == 1 and s.layer is not None]
    first = min((s.layer for s in sites if s.layer is not None), default=None)
    graphs = {s.graph for s in sites if s.layer == first}
    return [step for step in recorder.steps if step.graph in graphs]


def _sites_of(step: DecodeStep, forwards: Sequence[ForwardReport], decoder: Sequence[SiteReport]) -> list[SiteReport]:
    """All decoder sites of the last forward that ran the graph of ``step``."""
    graphs = next((f.graphs.keys() for f in reversed(forwards) if step.graph in f.graphs), {step.graph})
    return [site for site in decoder if site.graph in graphs]


@dataclass(frozen=True)
class _Step:
    """One decode step under the sections of a plan."""

    vision: VisionPolicy | None
    text: TextPolicy | None
    rows: tuple[PromptRow, ...]
    step: DecodeStep
    later: int = 0
    """Tokens after ``step``."""

    def keys(self, site: SiteReport) -> int:
        """Rows of the cache that dense attention reads for one batch row."""
        if site.cache == "dynamic" and site.kind == "full":
            return self.step.keys + self.later
        # What does not grow, and sliding windows, are taken as they are.
        return site.keys if isinstance(site.keys, int) else self.step.keys

    def costs(self, site: SiteReport) -> StepCosts:
        """What the step costs ``site``, whichever kind of step it is."""
        dense = step_cost(site, self.keys(site) * len(self.rows), 0)
        if not is_partitioned(site):
            return StepCosts(dense, dense if self._has_core_steps else None, dense, dense)
        core, secondary = (
            step_cost(site, *map(sum, zip(*(self._rows_read(row, site, kind) for row in self.rows), strict=True)))
            for kind in (False, True)
        )
        mean = StepCost(
            mean_over_period(core.kv_bytes, secondary.kv_bytes, self.vision),
            mean_over_period(core.attention_flops, secondary.attention_flops, self.vision),
        )
        return StepCosts(dense, core if self._has_core_steps else None, secondary, mean)

    def row(self, row: PromptRow) -> RowReads:
        """What is read of one batch row."""
        core, secondary = (1.0, 1.0) if self.vision is None else (self.vision.core, self.vision.secondary)
        visual = row.visual, visual_kept(row.visual, core), visual_kept(row.visual, secondary)
        if self.text is None or self.text.is_identity or not row.visual:
            return RowReads(*visual, None, None)
        before = row.text + self.step.number - 1
        return RowReads(*visual, before + 1, text_kept(before, self.text) + 1)

    @property
    def _has_core_steps(self) -> bool:
        """Whether some steps read core alone."""
        return self.vision is not None and self.vision.refresh > 1

    def _rows_read(self, row: PromptRow, site: SiteReport, secondary: bool) -> tuple[int, int]:
        """Rows read of one batch row, and those of them whose logits are inherited."""
        number = self.step.number + self.later
        rows = rows_read(row, self.keys(site), number, self.vision, self.text, secondary)
        if site.inherits != "visual":
            return rows, rows if site.inherits == "all" else 0
        if self.vision is None:
            return rows, row.visual
        return rows, visual_kept(row.visual, self.vision.secondary if secondary else self.vision.core)


def step_cost(site: SiteReport, rows: int, inherited: int) -> StepCost:
    """What a decode step costs ``site``.

    Args:
        site: of one query.
        rows: cache rows that are read, over the batch.
        inherited: those of them whose logit is its anchor's: no key is read and multiplied, but a float32 number for
            each query head is read.
    """
    itemsize = getattr(torch, site.dtype).itemsize
    keys = key_bytes(1, site.kv_heads, rows - inherited, site.head_dim, itemsize)
    values = key_bytes(1, site.kv_heads, rows, 0 if site.latent else site.value_dim, itemsize)
    products = attention_flops(1, site.heads, 1, rows - inherited, site.head_dim, 0)
    sums = attention_flops(1, site.heads, 1, rows, 0, site.value_dim)
    return StepCost(keys + values + inherited * site.heads * torch.float32.itemsize, products + sums)


def _sum(costs: Sequence[StepCosts]) -> StepCosts:
    def total(parts: Sequence[StepCost]) -> StepCost:
        return StepCost(sum(p.kv_bytes for p in parts), sum(p.attention_flops for p in parts))

    core = [c.core for c in costs if c.core is not None]
    return StepCosts(
        total([c.dense for c in costs]),
        total(core) if core else None,
        total([c.secondary for c in costs]),
        total([c.mean for c in costs]),
    )
