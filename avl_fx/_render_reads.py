"""The table of a report's `DecodeReads`: what a decode step reads, kind by kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from avl_fx._table import ascii_table, cell
from avl_fx._words import count, flops, kib, percent, ranges

if TYPE_CHECKING:
    from avl_fx.report import DecodeReads, LayerReads, Report, StepCost, StepCosts

__all__ = ["render_reads"]

_SHOWN_ROWS = 4


def render_reads(report: Report, reads: DecodeReads) -> list[RenderableType]:
    """The table, and what it means in words."""
    parts: list[RenderableType] = []
    if reads.undivided is not None:
        parts.append(cell(f"The cache was not partitioned: {reads.undivided}.", "yellow"))
    if reads.total is not None:
        parts += [_table(reads, reads.total), _facts(reads)]
        parts += [cell(line) for line in _inheritance(report)]
        if any(site.device == "cuda" for site in report.sites):
            parts.append(cell("On a GPU refreshes and steps under a text window go over the keys twice: not counted."))
    if reads.steps:
        parts.append(cell(_steps(reads), "yellow" if "all" in reads.steps else ""))
    return parts


def _inheritance(report: Report) -> Iterable[str]:
    """What lazy layers read in decode steps."""
    ways = {s.inherits for s in report.sites if s.anchor is not None and s.queries == 1 and s.reason is None}
    if "all" in ways:
        yield "Lazy layers take their anchor's logits, a float32 number for each query head, and read no keys."
    if "visual" in ways:
        yield "Lazy layers take their anchor's logits against visual keys, a float32 number for each query head."
    if "none" in ways:
        yield "Lazy layers multiply keys again: they read as many rows as others."


def _table(reads: DecodeReads, total: StepCosts) -> Table:
    split = total.core is not None
    kinds = ("core step", f"refresh, 1 in {reads.refresh_every_steps}", "average") if split else ("under the plan",)
    table = ascii_table("keys and values", "dense", *kinds)
    for layers, costs in _groups(reads.layers):
        table.add_row(layers, *_bytes(costs))
    table.add_row("all layers", *_bytes(total), style="bold")
    for more, costs in reads.later.items():
        table.add_row(f"{more:,} tokens later", *_bytes(costs), style="dim")
    table.add_row("attention FLOPs", *_flops(total))
    return table


def _groups(layers: Iterable[LayerReads]) -> list[tuple[str, StepCosts]]:
    """Layers that read alike, in one line."""
    groups: dict[StepCosts, list[int]] = {}
    for entry in layers:
        groups.setdefault(entry.costs, []).extend([] if entry.layer is None else [entry.layer])
    return [
        (
            f"layer{'s' if len(numbers) > 1 else ''} {ranges(numbers) or '?'}{', each' if len(numbers) > 1 else ''}",
            costs,
        )
        for costs, numbers in groups.items()
    ]


def _bytes(costs: StepCosts) -> list[Text]:
    kinds = [c.kv_bytes for c in _kinds(costs)]
    return [cell(kib(costs.dense.kv_bytes)), *(_less(kib(b), b, costs.dense.kv_bytes) for b in kinds)]


def _flops(costs: StepCosts) -> list[Text]:
    kinds = [c.attention_flops for c in _kinds(costs)]
    return [cell(flops(costs.dense.attention_flops)), *(_less(flops(f), f, costs.dense.attention_flops) for f in kinds)]


def _kinds(costs: StepCosts) -> tuple[StepCost, ...]:
    return (costs.mean,) if costs.core is None else (costs.core, costs.secondary, costs.mean)


def _less(text: str, part: float, whole: float) -> Text:
    return cell(text) if part >= whole else cell(f"{text} (-{percent(whole - part, whole)})", "green")


def _facts(reads: DecodeReads) -> Table:
    """What the figures are for, batch row by batch row."""
    rows = reads.rows
    facts = [("keys", f"{reads.keys} in each of {count(len(rows), 'batch row')}")]
    if all(r.secondary_tokens == r.visual_tokens for r in rows):
        kept = "all of them secondary"
    else:
        kept = f"secondary {_each(r.secondary_tokens for r in rows)}"
    if reads.total is not None and reads.total.core is not None:
        kept = f"core {_each(r.core_tokens for r in rows)}; {kept}"
    facts.append(("visual", f"{_each(r.visual_tokens for r in rows)} tokens: {kept}"))
    if any(r.text_tokens is not None for r in rows):
        read = _each(r.text_tokens_read for r in rows)
        facts.append(("text", f"{_each(r.text_tokens for r in rows)} tokens behind the first visual one: read {read}"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, fact in facts:
        grid.add_row(name, cell(fact))
    return grid


def _each(values: Iterable[int | None]) -> str:
    """One number a batch row, the first few of them."""
    every = ["-" if value is None else str(value) for value in values]
    return ", ".join(every[:_SHOWN_ROWS] + ["..."] * (len(every) > _SHOWN_ROWS))


def _steps(reads: DecodeReads) -> str:
    refresh = "refresh" if reads.refresh_every_steps > 1 else "under the plan"
    words = {"core": "core", "secondary": refresh, "all": "dense"}
    ran = [f"{reads.steps[kind]} {word}" for kind, word in words.items() if kind in reads.steps]
    return f"decode steps of this run: {', '.join(ran)}"
