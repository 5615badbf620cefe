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
from avl_fx.savings import attention_flops, kv_bytes

__all__ = ["decode_reads", "is_partitioned"]

LATER = (256, 1024)
"""Tokens after which the figures are given once more."""


def is_partitioned(site: SiteReport) -> bool:
    """Whether the plan's section ``vision`` or ``text`` was applied to a site."""
    return "partitioned" in site.action


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
    if not recorder.divisions:
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
        dense = self._cost(site, [self.keys(site)] * len(self.rows))
        if not is_partitioned(site):
            return StepCosts(dense, dense if self._has_core_steps else None, dense, dense)
        core, secondary = (
            self._cost(site, [self._rows_read(row, site, kind) for row in self.rows]) for kind in (False, True)
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

    def _rows_read(self, row: PromptRow, site: SiteReport, secondary: bool) -> int:
        number = self.step.number + self.later
        return rows_read(row, self.keys(site), number, self.vision, self.text, secondary)

    @staticmethod
    def _cost(site: SiteReport, rows: Sequence[int]) -> StepCost:
        """Of reading so many cache rows for each batch row."""
        total, itemsize = sum(rows), getattr(torch, site.dtype).itemsize
        return StepCost(
            kv_bytes(1, site.kv_heads, total, site.head_dim, site.value_dim, itemsize),
            attention_flops(1, site.heads, 1, total, site.head_dim, site.value_dim),
        )


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
