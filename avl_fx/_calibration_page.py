"""The page of a calibration: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from avl_fx._words import count

if TYPE_CHECKING:
    from avl_fx.calibration_report import CalibrationReport

__all__ = ["page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th { color: #666; font-weight: normal; } td.words, th.words { text-align: left; }
img { max-width: 100%; } .lazy { background: #fdeee6; } .anchor { background: #f7cfc9; }
.layout { display: flex; gap: 2px; } .layout span { flex: 1; text-align: center; padding: .3rem 0; font-size: .75rem; }
.dense { background: #e3e9f1; } .warning { color: #a33; } pre { background: #f6f6f6; padding: .8rem; overflow: auto; }
tr.dense { background: none; }
"""


def page(report: CalibrationReport, image: bytes) -> str:
    """HTML text; ``image`` is a PNG, which goes into it."""
    savings, ratios = report.savings, report.ratios
    facts = [
        ("target", f"{report.target} {report.value:g}"),
        ("seen", f"{count(report.samples, 'sample')} in {count(report.batches, 'batch')}"),
        ("blocks", ", ".join(f"{first}-{last}" for first, last in report.blocks) or "none"),
        ("lazy layers", f"{savings.lazy_layers} of {savings.layers}"),
        ("divergence of all lazy layers from their anchors", f"{report.cost:.4g} nats"),
        (
            "KV bytes a token",
            f"{savings.kv_bytes_before:,} -> {savings.kv_bytes_after:,} ({100 * savings.kv_share:.1f}% saved)",
        ),
        ("linear calls of the decoder a forward", f"{savings.linears_before} -> {savings.linears_after}"),
        (
            "proposed shares of the visual keys",
            "none: no visual keys" if ratios is None else f"core {ratios.core:g}, secondary {ratios.secondary:g}",
        ),
        ("fingerprint of the plan", report.plan.fingerprint()),
    ]
    encoded = base64.b64encode(image).decode()
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f"<title>Calibration of {escape(report.model)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>Calibration of {escape(report.model)}</h1>",
            *(f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings),
            _table(("", ""), [("", fact) for fact in facts], words=(0, 1), header_row=False),
            "<h2>Block layout</h2>",
            _layout(report),
            "<p>Dark: anchors. Light: lazy layers, which inherit from the anchor before them.</p>",
            "<h2>Similarity of the layers</h2>",
            f'<img alt="heat map of the divergences" src="data:image/png;base64,{encoded}">',
            "<p>Jensen-Shannon divergence, natural logarithm (0 to 0.693), of the attention rows of the prompt's last "
            "token; mean over query heads and samples.</p>",
            "<h2>Layers</h2>",
            _layers(report),
            "<h2>Plan</h2>",
            f"<pre>{escape(report.plan.to_json())}</pre>",
            "</body></html>",
            "",
        ]
    )


def _layout(report: CalibrationReport) -> str:
    cells = (f'<span class="{s.role}" title="layer {s.layer}: {s.role}">{s.layer}</span>' for s in report.layers)
    return f'<div class="layout">{"".join(cells)}</div>'


def _layers(report: CalibrationReport) -> str:
    header = (
        "layer",
        "kind",
        "role",
        "from the layer before",
        "from its anchor",
        "on visual keys",
        "core",
        "secondary",
    )
    rows = [
        (
            layer.role,
            (
                str(layer.layer),
                layer.kind or f"not observed: {layer.excluded}",
                layer.role if layer.anchor is None else f"lazy (anchor {layer.anchor})",
                _number(layer.divergence_before),
                _number(layer.divergence_anchor),
                "" if layer.visual_mass is None else f"{layer.visual_mass:.1%}",
                "" if layer.ratios is None else f"{layer.ratios.core:g}",
                "" if layer.ratios is None else f"{layer.ratios.secondary:g}",
            ),
        )
        for layer in report.layers
    ]
    return _table(header, rows, words=(1, 2))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(
    header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], words: Sequence[int] = (), header_row: bool = True
) -> str:
    """Rows are pairs: a CSS class, and the cells. ``words``: columns of text."""

    def line(role: str, tag: str, cells: Sequence[str]) -> str:
        parts = (
            f'<{tag} class="{"words" if number in words else "number"}">{escape(cell)}</{tag}>'
            for number, cell in enumerate(cells)
        )
        return f'<tr class="{role}">{"".join(parts)}</tr>'

    lines = [line("", "th", header)] if header_row else []
    return f"<table>{''.join([*lines, *(line(role, 'td', cells) for role, cells in rows)])}</table>"
