"""The table of a report: sites with the same facts share a line, everything is ASCII, nothing is wider than asked."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from avl_fx._render_reads import render_reads
from avl_fx._table import ascii_table, cell
from avl_fx._words import ascii_only, count, either, flops, flops_change, kib, percent, ranges, seconds, symbols

if TYPE_CHECKING:
    from avl_fx.report import GraphReport, Report, SavingsReport, SiteReport, TowerReport

__all__ = ["render_report", "to_html", "to_text"]

_SHOWN_ROWS = 4
_SHOWN_SHAPES = 3


def to_text(renderable: Any, width: int, color: bool) -> str:
    """What a console of ``width`` columns would print."""
    file = io.StringIO()
    system = "standard" if color else None
    console = Console(file=file, width=width, force_terminal=color, color_system=system, legacy_windows=False)  # type: ignore[arg-type]
    console.print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def to_html(renderable: Any, width: int) -> str:
    """The same for notebooks."""
    console = Console(file=io.StringIO(), width=width, record=True, force_terminal=True, legacy_windows=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.25">{code}</pre>')


def render_report(report: Report) -> Group:
    """The whole report, from what was run to what to do about it."""
    parts: list[RenderableType] = [cell(f"avl_fx explain: {report.model}", "bold"), _summary(report)]
    for tower in report.towers:
        parts += [_tower_title(tower), _tower_table(report, tower)]
    parts += [_heading("Graphs"), _graph_table(report.graphs), *_failures(report.graphs)]
    if report.savings or report.kv:
        parts += [_heading("What the plan saves"), _savings_table(report.savings), *_kv_lines(report)]
    if report.decode_reads is not None:
        parts += [_heading("What a decode step reads"), *map(_indented, render_reads(report, report.decode_reads))]
    parts += [_heading("Time"), *_time_lines(report)]
    if report.stopped:
        parts += [_heading("The run stopped early", "bold red"), _indented(cell(report.stopped, "red"))]
    if report.advice:
        parts += [_heading("Advice", "bold yellow"), *map(_bullet, report.advice)]
    return Group(*parts)


def _heading(text: str, style: str = "bold cyan") -> Padding:
    return Padding(Text(text, style=style), (1, 0, 0, 0))


def _indented(text: RenderableType) -> Padding:
    return Padding(text, (0, 0, 0, 2))


def _bullet(line: str) -> Padding:
    grid = Table.grid(padding=(0, 1))
    grid.add_row("*", cell(line))
    return _indented(grid)


# ---- the top -----------------------------------------------------------------------------------------------------


def _summary(report: Report) -> Table:
    decoder = report.decoder
    expected = "of unknown depth" if decoder.expected is None else f"{count(decoder.expected, 'layer')} expected"
    seen = "; ".join(f"{phase} saw {len(layers)}" for phase, layers in decoder.seen.items())
    complete = seen and all(len(layers) == decoder.expected for layers in decoder.seen.values())
    phases = ", ".join(f"{n} {phase}" for phase, n in Counter(f.phase for f in report.forwards).items())
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("plan", cell(report.plan_text))
    grid.add_row("run", cell(f"{report.front_door}, compiler {report.compiler}; {phases or 'no forward finished'}"))
    for name, ran in report.kernels.items():
        same = name == ran
        what = f"{name}, which no graph shows" if same else f"{ran} instead of {name}, which no graph shows"
        grid.add_row("attention", cell(what, "yellow" if same else ""))
    grid.add_row("decoder", cell(f"{expected}; {seen or 'none seen'}", "" if complete else "yellow"))
    grid.add_row("visual", cell(_visual(report)))
    for reason, times in report.breaks.items():
        grid.add_row("graph break", cell(f"{reason} ({times}x)"))
    return grid


def _visual(report: Report) -> str:
    if report.visual is None:
        return "no visual positions known"
    rows = []
    for number, spans in enumerate(report.visual[:_SHOWN_ROWS]):
        where = ", ".join(f"{start}-{start + length - 1}" for start, length in spans) or "none"
        total = sum(length for _, length in spans)
        rows.append(f"row {number}: {where}" + (f" ({count(total, 'token')})" if spans else ""))
    more = len(report.visual) - _SHOWN_ROWS
    return "; ".join(rows) + (f"; and {count(more, 'more row')}" if more > 0 else "")


# ---- sites -------------------------------------------------------------------------------------------------------


def _tower_title(tower: TowerReport) -> Padding:
    facts = "layers unknown"
    if tower.layers:
        facts = count(len(tower.layers), "layer") + ("" if tower.depth is None else f" of {tower.depth}")
        facts += f", up to {tower.sites_per_layer} sites in each" if tower.sites_per_layer > 1 else ""
    heads = f"heads {either(tower.heads)}, KV heads {either(tower.kv_heads)}, head dim {either(tower.head_dim)}"
    title = Text.assemble((f"{tower.role.capitalize()} ", "bold cyan"), (ascii_only(tower.path or "(root)"), "bold"))
    return Padding(title.append(f": {facts}, {heads}"), (1, 0, 0, 0))


def _cache(site: SiteReport) -> str:
    return f"{site.cache}, latents" if site.latent else site.cache


def _tower_table(report: Report, tower: TowerReport) -> Table:
    table = ascii_table("phase", "layers", "queries x keys", "mask", "cache", "kind", "outcome")
    previous = ""
    for phase, layers, sites in _lines([s for s in report.sites if s.tower == tower.path]):
        shapes = list(dict.fromkeys(f"{symbols(s.queries)} x {symbols(s.keys)}" for s in sites))
        shown = ", ".join(shapes[:_SHOWN_SHAPES] + ["..."] * (len(shapes) > _SHOWN_SHAPES))
        site = sites[0]
        table.add_row(
            "" if phase == previous else phase, layers, shown, site.mask, _cache(site), site.kind, _outcome(site)
        )
        previous = phase
    return table


def _lines(sites: Sequence[SiteReport]) -> list[tuple[str, str, list[SiteReport]]]:
    """``(phase, layers, sites)``: a line for every run of consecutive layers that have the same facts."""
    lines: list[tuple[str, str, list[SiteReport]]] = []
    for phase in dict.fromkeys(p for s in sites for p in s.phases):
        runs: list[tuple[tuple[Hashable, ...], list[int], list[SiteReport]]] = []
        for layer, group in _by_layer([s for s in sites if phase in s.phases]):
            facts = tuple(dict.fromkeys(map(_facts, group)))
            if runs and runs[-1][0] == facts and _follows(layer, runs[-1][1]):
                runs[-1][1].extend([] if layer is None else [layer])
                runs[-1][2].extend(group)
            else:
                runs.append((facts, [] if layer is None else [layer], list(group)))
        for facts, layers, group in runs:
            lines += [(phase, ranges(layers) or "?", [s for s in group if _facts(s) == fact]) for fact in facts]
    return lines


def _follows(layer: int | None, run: Sequence[int]) -> bool:
    return not run if layer is None else bool(run) and layer == run[-1] + 1


def _by_layer(sites: Iterable[SiteReport]) -> list[tuple[int | None, list[SiteReport]]]:
    """Sites of each layer in ascending order; those whose layer is unknown come last, by module."""
    known: dict[int, list[SiteReport]] = {}
    unknown: dict[str, list[SiteReport]] = {}
    for site in sites:
        if site.layer is None:
            unknown.setdefault(site.module_path, []).append(site)
        else:
            known.setdefault(site.layer, []).append(site)
    return [*sorted(known.items()), *((None, group) for group in unknown.values())]


def _facts(site: SiteReport) -> Hashable:
    """What the sites of one line share: everything that the line shows, apart from shapes, and the geometry."""
    geometry = (site.heads, site.kv_heads, site.head_dim, site.value_dim, site.dtype)
    return geometry, site.mask, site.cache, site.kind, site.status, site.action, site.reason, site.detail


def _outcome(site: SiteReport) -> Text:
    detail = f" ({site.detail})" if site.detail else ""
    if site.status == "refused":
        # One section of the plan may have been applied, and the next refused.
        before = "" if site.action == "dense" else f"{site.action}; "
        return cell(f"{before}refused: {site.reason}{detail}", "red")
    style = "" if site.action == "dense" else "yellow" if detail else "green"
    return cell(site.action + detail, f"bold {style}" if site.action.startswith("anchor") else style)


# ---- graphs ------------------------------------------------------------------------------------------------------


def _graph_table(graphs: Iterable[GraphReport]) -> Table:
    table = ascii_table("graphs", "runs in", "nodes", "attention", "decoder layers", "linears", "visual")
    groups: dict[Hashable, list[GraphReport]] = {}
    for graph in graphs:
        groups.setdefault(_graph_facts(graph), []).append(graph)
    for group in groups.values():
        first = group[0]
        calls = [phase if n == 1 or len(group) > 1 else f"{phase} {n}x" for g in group for phase, n in g.calls.items()]
        layers = ranges(n for g in group for n in g.decoder_layers)
        table.add_row(
            ranges(g.index for g in group),
            ", ".join(dict.fromkeys(calls)) or f"{first.phase} (never ran)",
            _change([g.nodes_before for g in group], [g.nodes_after for g in group]),
            count(first.sites, "site") if first.sites else "-",
            layers + ", one graph each" * (bool(layers) and len(group) > 1) or "-",
            _change([g.linears_before for g in group], [g.linears_after for g in group]),
            first.visual,
            style="red" if first.failure else "" if first.sites else "dim",
        )
    return table


def _failures(graphs: Iterable[GraphReport]) -> list[Padding]:
    return [
        _indented(cell(f"graph {graph.index}: a pass failed, compiled untouched: {graph.failure}", "red"))
        for graph in graphs
        if graph.failure
    ]


def _graph_facts(graph: GraphReport) -> Hashable:
    """Graphs that share a line: those without attention, and those that differ in their layers only."""
    if not graph.sites and graph.failure is None:
        return graph.visual
    size = (graph.nodes_before, graph.nodes_after, graph.linears_before, graph.linears_after)
    return tuple(graph.calls.items()), size, graph.sites, len(graph.decoder_layers), graph.visual, graph.failure


def _change(before: Sequence[int], after: Sequence[int]) -> str:
    if len(set(before)) > 1:
        return f"{min(before)}..{max(before)}"
    return str(before[0]) if before[0] == after[0] else f"{before[0]} -> {after[0]}"


# ---- savings and time --------------------------------------------------------------------------------------------


def _savings_table(savings: Iterable[SavingsReport]) -> Table:
    savings = tuple(savings)
    changed = any(phase.attention != phase.attention_plan_flops for phase in savings)
    attention = "attention" if changed else "attention (unchanged)"
    table = ascii_table("one forward", "matmuls with a weight", "of these saved", "RoPE", attention)
    for phase in savings:
        saved = phase.linear_before - phase.linear_after
        table.add_row(
            phase.phase,
            flops_change(phase.linear_before, phase.linear_after) if saved else flops(phase.linear_before),
            cell(f"-{flops(saved)} ({percent(saved, phase.linear_before)})", "green") if saved else "-",
            f"-{flops(phase.rope_saved)}" if phase.rope_saved else "-",
            _attention(phase),
        )
    return table


def _attention(phase: SavingsReport) -> Text:
    dense, plan = phase.attention, phase.attention_plan_flops
    if dense is None or plan is None:
        return cell("unknown")
    return cell(flops(dense)) if plan == dense else cell(flops_change(dense, plan), "green" if plan < dense else "")


def _kv_lines(report: Report) -> list[Padding]:
    kv = report.kv
    if kv is None:
        return []
    how = "" if kv.measured else ", computed"
    line = cell(f"KV cache ({kv.kind}, {kv.dtype}, {count(kv.length, 'position')}{how}): {kib(kv.dense)}")
    if kv.plan < kv.dense:
        line.append(f" -> {kib(kv.plan)} (-{percent(kv.dense - kv.plan, kv.dense)})", style="green")
    if kv.dropped_layers:
        why = "not written, but a static cache keeps its buffers" if kv.kind == "static" else "not stored"
        line.append(f"; keys of layers {ranges(kv.dropped_layers)} are {why}")
        if kv.empty_bytes:
            line.append(f" ({kib(kv.empty_bytes)}, which an AVLCache does not take)")
    if kv.spared_bytes:
        line.append(f"; {kib(kv.spared_bytes)} are visual keys of lazy layers, which an AVLCache does not store")
    if kv.kind != "compact" and report.decode_reads is not None and report.decode_reads.total is not None:
        line.append("; rows that a step does not read are stored as before: nothing is lost")
    if kv.spare_bytes:
        line.append(f"; room for later tokens takes {kib(kv.spare_bytes)} more")
    return [_indented(line)]


def _time_lines(report: Report) -> list[Padding]:
    share = percent(report.pass_seconds, report.capture_seconds)
    passes, capture = seconds(report.pass_seconds), seconds(report.capture_seconds)
    total = f"passes {passes} of {capture} tracing and compiling ({share}); explain {seconds(report.seconds)}"
    each = ", ".join(f"{p.name} {seconds(p.seconds)}" for p in sorted(report.passes, key=lambda p: -p.seconds))
    return [_indented(cell(total)), *([_indented(cell(each, "dim"))] if each else [])]
