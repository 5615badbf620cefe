"""The picture of a calibration: how alike the layers are, with the blocks; divergence and visual mass by layer."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from avl_fx.errors import CalibrationError

if TYPE_CHECKING:
    from avl_fx.calibration_report import CalibrationReport

__all__ = ["need_matplotlib", "picture"]

_BLOCK, _LAZY, _ANCHOR, _DENSE = "#d62728", "#f4a582", "#d62728", "#92a8c4"
_DOTS = 130


def need_matplotlib() -> None:
    """Fail now rather than after the last batch.

    Raises:
        CalibrationError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise CalibrationError(
            "the report holds a picture, which matplotlib draws; it is not installed",
            field="report",
            remedy="pip install 'avl-fx[calibrate]', or drop report",
        ) from error


def picture(report: CalibrationReport) -> bytes:
    """A PNG. Raises `CalibrationError` where matplotlib is missing."""
    need_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13.5, 7.4), dpi=_DOTS, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1))
    _heat_map(figure, figure.add_subplot(grid[:, 0]), report)
    _by_layer(figure.add_subplot(grid[0, 1]), report)
    _visual(figure.add_subplot(grid[1, 1]), report)
    lazy, layers = report.savings.lazy_layers, report.savings.layers
    figure.suptitle(
        f"{report.model}: {lazy} of {layers} decoder layers lazy, "
        f"{100 * report.savings.kv_share:.1f}% of the KV bytes saved   "
        f"({report.target} {report.value:g}; {report.samples} samples)",
        fontsize=13,
    )
    out = io.BytesIO()
    # No date and no version among the metadata: equal reports are equal files.
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _heat_map(figure: Any, axes: Any, report: CalibrationReport) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch, Rectangle

    layers = len(report.matrix)
    shown = [[value if math.isfinite(value) else math.nan for value in row] for row in report.matrix]
    colours = colormaps["viridis_r"].with_extremes(bad="#d9d9d9")
    apart = [value for n, row in enumerate(report.matrix) for m, value in enumerate(row) if n != m]
    highest = max((value for value in apart if math.isfinite(value)), default=0.0)
    image = axes.imshow(shown, cmap=colours, vmin=0, vmax=highest or 1.0, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.72, label="Jensen-Shannon divergence (nats)")
    for first, last in report.blocks:
        size = last - first + 1
        corner = (first - 0.5, first - 0.5)
        # Not clipped: a block may end where the picture does.
        outline = Rectangle(corner, size, size, fill=False, edgecolor=_BLOCK, linewidth=2.2, clip_on=False)
        axes.add_patch(outline)
    if layers <= 12:
        _numbers(axes, shown, highest)
    _layer_ticks(axes.xaxis, layers)
    _layer_ticks(axes.yaxis, layers)
    axes.set(xlabel="decoder layer", ylabel="decoder layer", title="How differently two layers attend")
    named = [Patch(fill=False, edgecolor=_BLOCK, linewidth=2.2, label="lazy block (its first layer is the anchor)")]
    if any(not math.isfinite(value) for value in apart):
        named.append(Patch(facecolor="#d9d9d9", label="may not share a block"))
    axes.legend(handles=named, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False, fontsize=9)


def _numbers(axes: Any, shown: list[list[float]], highest: float) -> None:
    for n, row in enumerate(shown):
        for m, value in enumerate(row):
            if not math.isnan(value):
                colour = "white" if value > 0.55 * highest else "black"
                axes.text(m, n, f"{value:.3f}", ha="center", va="center", fontsize=8, color=colour)


def _by_layer(axes: Any, report: CalibrationReport) -> None:
    from matplotlib.patches import Patch

    colours = {"anchor": _ANCHOR, "lazy": _LAZY, "dense": _DENSE}
    compared = [layer for layer in report.layers if layer.divergence_before is not None]
    axes.bar(
        [layer.layer for layer in compared],
        [layer.divergence_before for layer in compared],
        color=[colours[layer.role] for layer in compared],
    )
    named: list[Any] = [Patch(color=colour, label=role) for role, colour in colours.items()]
    lazy = [layer for layer in report.layers if layer.divergence_anchor is not None]
    if lazy:
        named += axes.plot(
            [layer.layer for layer in lazy],
            [layer.divergence_anchor for layer in lazy],
            "k.",
            markersize=6,
            label="from its anchor",
        )
    if report.target == "epsilon":
        named.append(axes.axhline(report.value, color="black", linestyle="--", linewidth=1, label="epsilon"))
    _layer_ticks(axes.xaxis, len(report.layers))
    axes.set(
        xlim=(-0.7, len(report.layers) - 0.3),
        xlabel="decoder layer",
        ylabel="divergence (nats)",
        title="Divergence from the layer before",
    )
    axes.margins(y=0.12)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "frameon": False}
    axes.legend(handles=named, fontsize=8, ncols=len(named), **below)


def _visual(axes: Any, report: CalibrationReport) -> None:
    axes.set(
        xlim=(-0.7, len(report.layers) - 0.3),
        ylim=(0, 1.02),
        xlabel="decoder layer",
        ylabel="share",
        title="Attention to the image, of the prompt's last token",
    )
    _layer_ticks(axes.xaxis, len(report.layers))
    seen = [layer for layer in report.layers if layer.visual_mass is not None]
    if not seen:
        axes.text(0.5, 0.5, "no visual keys in self-attention", ha="center", va="center", transform=axes.transAxes)
        return
    axes.bar(
        [s.layer for s in seen], [s.visual_mass or 0.0 for s in seen], color="#bcd7ea", label="attention on visual keys"
    )
    spread = [(s.layer, s.visual_spread) for s in report.layers if s.visual_spread is not None]
    for mass, style in (("0.5", "o:"), ("0.8", "s-"), ("0.95", "^--")):
        label = f"visual keys that hold {float(mass):.0%} of it"
        axes.plot([n for n, _ in spread], [s[mass] for _, s in spread], style, markersize=4, linewidth=1.2, label=label)
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)


def _layer_ticks(axis: Any, layers: int) -> None:
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 1000) if layers <= 24 * step)
    axis.set_ticks(range(0, layers, step))
