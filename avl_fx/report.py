"""What `explain` returns: plain data about one run, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from avl_fx._messages import quote
from avl_fx._render import render_report, to_html, to_text
from avl_fx.errors import OptionError

__all__ = [
    "DecodeReads",
    "DecoderReport",
    "ForwardReport",
    "GraphReport",
    "KVReport",
    "LayerReads",
    "PassReport",
    "Report",
    "RowReads",
    "SavingsReport",
    "SiteReport",
    "StepCost",
    "StepCosts",
    "TowerReport",
]

Spans = tuple[tuple[int, int], ...]

DEFAULT_WIDTH = 100
"""Columns of the table where no terminal says how wide it is."""


@dataclass(frozen=True)
class SiteReport:
    """One attention call in one graph. Shapes are ints or, where symbolic, strings such as ``"s53 + 1"``."""

    graph: int
    phases: tuple[str, ...]
    """Phases in which its graph was captured or ran: ``prefill``, ``decode``."""
    tower: str
    """Path of the list of layers that it belongs to, from the root of the model; its own path where there is none."""
    role: str
    layer: int | None
    module_path: str
    """From the root of the model."""
    module_class: str | None
    kind: str
    style: str
    batch: int | str
    queries: int | str
    keys: int | str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    device: str
    mask: str
    cache: str
    unrepeated: bool
    visual: str
    status: str
    action: str
    reason: str | None
    detail: str
    anchor: int | None = None
    """The layer that a lazy one inherits from."""
    inherits: str = "none"
    """Which logits it takes from its anchor: ``none``, ``all``, or ``visual``, those against visual keys."""
    latent: bool = False
    """The cache holds latents, of which keys and values are made. A decode step reads them as they are: keys are
    latents and rotated keys side by side then, and values the latents themselves."""


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo captured."""

    index: int
    phase: str
    """Phase in which it was captured."""
    calls: dict[str, int]
    """Phase -> how often the graph ran in it; empty where the run stopped before."""
    nodes_before: int
    nodes_after: int
    linears_before: int
    linears_after: int
    """Matmuls with a weight."""
    linear_flops_before: int
    linear_flops_after: int
    """FLOPs of those in one call, at the sizes the graph was captured with."""
    sites: int
    decoder_layers: tuple[int, ...]
    visual: str
    """``discovered``, ``carried`` or ``given``; ``none`` where the graph knows no visual positions."""
    pass_seconds: float
    compile_seconds: float
    failure: str | None
    """Why the untouched graph was compiled, where a pass failed."""
    before: str | None = field(default=None, repr=False)
    after: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ForwardReport:
    """One call of the model."""

    phase: str
    """``prefill``: the first one. ``decode``: every later one."""
    seconds: float
    """Since the call before it ended: `generate` encodes images before it calls the model."""
    captured: tuple[int, ...]
    """Graphs captured in that time, which then is mostly tracing."""
    graphs: dict[int, int]
    """Graph -> how often it ran."""


@dataclass(frozen=True)
class TowerReport:
    """A run of sites that belong together."""

    path: str
    role: str
    depth: int | None
    """Layers that the model has there, where it tells."""
    layers: tuple[int, ...]
    """Layers seen."""
    sites_per_layer: int
    """The most that one layer has in one graph."""
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    """Every value that occurs."""


@dataclass(frozen=True)
class DecoderReport:
    """How much of the language decoder the graphs show."""

    expected: int | None
    """Layers that attend, as the model's configuration says."""
    seen: dict[str, tuple[int, ...]]
    """Phase -> layers that ran in a graph."""
    graphs: dict[str, int]
    """Phase -> the most graphs with decoder layers that one forward ran. More than one is a decoder in pieces."""


@dataclass(frozen=True)
class SavingsReport:
    """FLOPs of the last forward of a phase. See `avl_fx.savings` for the formulas."""

    phase: str
    lazy_layers: tuple[int, ...]
    linear_before: int
    linear_after: int
    """Matmuls with a weight in all graphs of that forward, counted in the graphs: what is gone is ``q_proj`` and
    ``k_proj`` of the lazy layers."""
    rope_saved: int
    """Rotary embedding of the lazy layers' queries and keys; 0 where the configuration tells of none."""
    attention: int | None
    """The decoder's logits and weighted sums, dense. ``None`` where a size is unknown."""
    attention_plan_flops: float | None
    """The same under the plan: of the average step between refreshes (of a dense one where the run had dense ones), and
    with the scores that a prompt gives."""


@dataclass(frozen=True)
class KVReport:
    """The KV cache at the end of the run."""

    length: int
    """Positions in the longest layer."""
    dtype: str
    kind: str
    """``dynamic``, ``static`` or ``other``."""
    dense: int
    """Bytes, had every layer stored its keys."""
    plan: int
    """Bytes."""
    dropped_layers: tuple[int, ...]
    """Layers whose keys are not stored (``static``: whose buffers stay allocated, but empty)."""
    measured: bool
    """Read from the cache itself; else computed from the sites."""
    spare_bytes: int | None
    """Room for later tokens behind those of a cache that grows in place; not in ``plan``. ``None``: not measured."""
    empty_bytes: int = 0
    """Key buffers of a static cache that nothing is written to, in ``plan``; an `AVLCache` has none."""
    spared_bytes: int = 0
    """Visual keys of lazy layers in the modes ``vla`` and ``vla_scores``, in ``plan``; an `AVLCache` stores none."""


@dataclass(frozen=True)
class StepCost:
    """Attention of one decode step, over the batch. See `avl_fx.reads` for what counts."""

    kv_bytes: float
    """Key and value rows that it reads, and logits that a lazy layer reads instead of keys."""
    attention_flops: float
    """Its logits and weighted sums."""


@dataclass(frozen=True)
class StepCosts:
    """The kinds of decode steps, all at one length of the cache."""

    dense: StepCost
    core: StepCost | None
    """A step between refreshes: text and core. ``None`` under plans that read secondary at every step."""
    secondary: StepCost
    """A refresh, or every step: text and secondary."""
    mean: StepCost
    """The average between refreshes."""


@dataclass(frozen=True)
class LayerReads:
    """One decoder layer's share of `DecodeReads`."""

    layer: int | None
    partitioned: bool
    """Else it reads every key that it attends to (a sliding window: those in the window)."""
    costs: StepCosts


@dataclass(frozen=True)
class RowReads:
    """What is read of one batch row, in keys."""

    visual_tokens: int
    core_tokens: int
    secondary_tokens: int
    text_tokens: int | None
    """Behind the first visual token, at the step that the costs are for; ``None`` without a text window, and in
    rows without visual tokens, which have none."""
    text_tokens_read: int | None


@dataclass(frozen=True)
class DecodeReads:
    """What decode steps read of a partitioned cache."""

    steps: dict[str, int]
    """How many decode steps of this run read ``core``, ``secondary`` (text with either), or ``all`` keys."""
    undivided: str | None
    """Why the cache was not partitioned; then no figures follow."""
    refresh_every_steps: int
    """0: every step reads secondary."""
    keys: int
    """Rows of the cache that the figures are for: what a dense step reads of a batch row."""
    rows: tuple[RowReads, ...]
    layers: tuple[LayerReads, ...]
    total: StepCosts | None
    """All decoder layers."""
    later: dict[int, StepCosts]
    """So many tokens later: all decoder layers. Empty for a static cache, whose buffer does not grow."""


@dataclass(frozen=True)
class PassReport:
    """One pass over all graphs."""

    name: str
    count: int
    refused: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class Report:
    """What `explain` found. ``print(report)`` shows it, `to_json` keeps it."""

    model: str
    plan: dict[str, Any]
    plan_text: str
    front_door: str
    compiler: str
    kernels: dict[str, str]
    """Implementations of attention that the model asks for and no graph shows (FlashAttention, flex_attention) -> what
    ran in their place, which may be themselves."""
    versions: dict[str, str]
    seconds: float
    """The whole run."""
    forwards: tuple[ForwardReport, ...]
    graphs: tuple[GraphReport, ...]
    towers: tuple[TowerReport, ...]
    sites: tuple[SiteReport, ...]
    decoder: DecoderReport
    visual: tuple[Spans, ...] | None
    """Per row of the batch, ``(start, length)`` of every run of visual positions; ``None`` where none are known."""
    savings: tuple[SavingsReport, ...]
    kv: KVReport | None
    decode_reads: DecodeReads | None
    """``None`` where the plan partitions nothing, or no site took it."""
    passes: tuple[PassReport, ...]
    breaks: dict[str, int]
    """Why Dynamo broke graphs, and how often."""
    advice: tuple[str, ...]
    stopped: str | None
    """The error of avl_fx that ended the run early, if one did."""

    @property
    def refused(self) -> tuple[SiteReport, ...]:
        """Sites that were left alone although the plan, or the backend, wanted more."""
        return tuple(site for site in self.sites if site.status == "refused")

    @property
    def capture_seconds(self) -> float:
        """Seconds of all forwards during which a graph was captured: tracing, passes and compilation."""
        return sum(forward.seconds for forward in self.forwards if forward.captured)

    @property
    def pass_seconds(self) -> float:
        """Seconds spent in the passes of all graphs."""
        return sum(graph.pass_seconds for graph in self.graphs)

    @property
    def pass_share(self) -> float:
        """Share of `capture_seconds` that the passes took, 0 to 1."""
        return self.pass_seconds / self.capture_seconds if self.capture_seconds else 0.0

    # ---- as data -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, ready for JSON. The text of the graphs is left out; see `dump`."""
        data: dict[str, Any] = _plain({"format": 1, **asdict(self)})
        for graph in data["graphs"]:
            del graph["before"], graph["after"]
        data["pass_seconds"], data["capture_seconds"] = self.pass_seconds, self.capture_seconds
        data["pass_share"] = self.pass_share
        return data

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def dump(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the report (``report.json``, ``report.txt``) and every graph before and after the passes.

        Args:
            folder: is made when missing; files of an earlier dump are overwritten.

        Returns:
            The files written.

        Raises:
            OptionError: the graphs were not kept, or the folder cannot be written to.
        """
        if any(graph.before is None or graph.after is None for graph in self.graphs):
            raise OptionError(
                "the graphs were not kept", field="keep_graphs", remedy="run explain(..., keep_graphs=True)"
            )
        texts = {"report.json": self.to_json() + "\n", "report.txt": self.render(width=DEFAULT_WIDTH, color=False)}
        for graph in self.graphs:
            stem = f"graph_{graph.index:03d}_{graph.phase}"
            texts[f"{stem}_before.py"], texts[f"{stem}_after.py"] = graph.before or "", graph.after or ""
        target = Path(os.path.expanduser(os.fspath(folder)))
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (target / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OptionError(
                f"cannot write to {quote(target)}: {error.strerror or error}",
                field="folder",
                remedy="name a folder that you may write to",
            ) from error
        return [target / name for name in texts]

    # ---- as a table ----------------------------------------------------------------------------------------------

    def render(self, *, width: int | None = None, color: bool | None = None) -> str:
        """The table as text, in ASCII.

        Args:
            width: columns; ``None`` takes the terminal's, and 100 where there is no terminal.
            color: whether to colour it; ``None`` when the standard output is a terminal (and ``NO_COLOR`` is not set).
        """
        terminal = sys.stdout is not None and sys.stdout.isatty()
        if width is None:
            width = max(shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns, 60) if terminal else DEFAULT_WIDTH
        return to_text(self, width, terminal if color is None else color)

    def __str__(self) -> str:
        return self.render()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield render_report(self)

    def _repr_html_(self) -> str:
        return to_html(self, DEFAULT_WIDTH)


def _plain(value: Any) -> Any:
    """Tuples as lists and keys as text, as JSON will have them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    return [_plain(item) for item in value]
