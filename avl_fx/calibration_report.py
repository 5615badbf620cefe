"""What a calibration found out and chose: plain data, as JSON, as a picture and as a page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avl_fx._findings import Findings
from avl_fx._messages import quote
from avl_fx._planfile import reason
from avl_fx._targets import Target
from avl_fx.blocks import Block, cost_of
from avl_fx.errors import CalibrationError
from avl_fx.passes.context import ObservedLayer
from avl_fx.plan import Plan
from avl_fx.similarity import MASSES

__all__ = ["CalibrationReport", "LayerFinding", "PredictedSavings", "Ratios", "proposed_ratios", "stored_bytes"]

CORE_MASS, SECONDARY_MASS = 0.8, 0.95
"""What core and secondary are to hold of the attention that falls on visual keys."""


@dataclass(frozen=True)
class Ratios:
    """Shares of the visual keys, for a plan's section ``vision``."""

    core: float
    """Holds `CORE_MASS` of the visual attention, on average; rounded up to hundredths."""
    secondary: float
    """Holds `SECONDARY_MASS`."""

    @classmethod
    def of(cls, spread: Iterable[float]) -> Ratios:
        """From the shares of the keys that hold each of `MASSES`."""
        by_mass = dict(zip(MASSES, spread, strict=True))
        core, secondary = (math.ceil(100 * by_mass[mass] - 1e-9) / 100 for mass in (CORE_MASS, SECONDARY_MASS))
        return cls(min(core, 1.0), min(secondary, 1.0))


@dataclass(frozen=True)
class LayerFinding:
    """One decoder layer."""

    layer: int
    kind: str | None
    """``full`` or ``sliding``; ``None`` where it was not observed."""
    role: str
    """``anchor``, ``lazy`` or ``dense``."""
    anchor: int | None
    """Of a lazy layer."""
    divergence_before: float | None
    """From the layer before, in nats; ``None`` where they cannot be compared or may not share."""
    divergence_anchor: float | None
    """From its anchor, in nats; of a lazy layer."""
    visual_mass: float | None
    """Share of the row that falls on visual keys."""
    visual_spread: dict[str, float] | None
    """Share of the visual attention -> the share of the visual keys that holds it."""
    ratios: Ratios | None
    """What the layer alone would need; of layers that attend to all keys."""
    excluded: str | None
    """Why the layer was not observed."""


@dataclass(frozen=True)
class PredictedSavings:
    """What the blocks save, exact for the layers that were observed.

    Other modes than ``gla`` save neither: their lazy layers have keys of their own for text.
    """

    lazy_layers: int
    layers: int
    kv_bytes_before: int
    kv_bytes_after: int
    """Keys and values of one token, in bytes, over all layers that were observed."""
    linears_before: int
    linears_after: int
    """Linear calls of the decoder in one forward."""

    @property
    def kv_share(self) -> float:
        """Share of the KV bytes that is saved."""
        return 1 - self.kv_bytes_after / self.kv_bytes_before if self.kv_bytes_before else 0.0


@dataclass(frozen=True)
class CalibrationReport:
    """One calibration. Divergences are Jensen-Shannon divergences with the natural logarithm: 0 to ln 2 = 0.693."""

    plan: Plan
    target: str
    value: float
    model: str
    """Its class."""
    batches: int
    samples: int
    blocks: tuple[Block, ...]
    cost: float
    """Sum of the divergences of all lazy layers from their anchors, in nats."""
    layers: tuple[LayerFinding, ...]
    matrix: tuple[tuple[float, ...], ...]
    """``[L][L]`` mean divergences; infinite where two layers may not share a block."""
    deviation: tuple[tuple[float, ...], ...]
    """``[L][L]`` their standard deviations over samples."""
    apart: dict[str, str]
    """``earlier-later`` -> why the two layers may not share a block."""
    ratios: Ratios | None
    """The one proposal for all layers: the mean over those that attend to all keys. ``None`` without visual keys."""
    savings: PredictedSavings
    warnings: tuple[str, ...]

    @classmethod
    def of(
        cls, found: Findings, target: Target, blocks: tuple[Block, ...], plan: Plan, model: str, warnings: Iterable[str]
    ) -> CalibrationReport:
        """What ``found`` says about ``blocks``, and about everything else."""
        matrix = found.statistics.mean_divergence()
        mode = "gla" if plan.lazy_policy is None else plan.lazy_policy.mode
        return cls(
            plan=plan,
            target=target.name,
            value=target.value,
            model=model,
            batches=found.batches,
            samples=found.statistics.samples,
            blocks=blocks,
            cost=cost_of(matrix, blocks),
            layers=tuple(_layers(found, matrix, blocks)),
            matrix=tuple(map(tuple, matrix)),
            deviation=tuple(map(tuple, found.statistics.deviation())),
            apart={f"{earlier}-{later}": why for (earlier, later), why in sorted(found.apart.items())},
            ratios=proposed_ratios(found),
            savings=_savings(found, blocks, mode),
            warnings=tuple(warnings),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what JSON holds. Infinite divergences are ``null``."""
        plain = {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__ if name != "plan"}
        plain["savings"]["kv_share"] = self.savings.kv_share
        return {"plan": json.loads(self.plan.to_json()), "fingerprint": self.plan.fingerprint(), **plain}

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def dump(self, folder: str | os.PathLike[str]) -> None:
        """Write ``plan.json``, ``report.json``, ``similarity.png`` and ``report.html`` into ``folder``.

        Raises:
            CalibrationError: the folder cannot be written to, or matplotlib is not installed.
        """
        from avl_fx._calibration_page import page
        from avl_fx._calibration_picture import picture

        path = Path(os.path.expanduser(folder))
        image = picture(self)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.plan.to_json(path / "plan.json")
            (path / "report.json").write_text(self.to_json(), encoding="utf-8")
            (path / "similarity.png").write_bytes(image)
            (path / "report.html").write_text(page(self, image), encoding="utf-8")
        except OSError as error:
            raise CalibrationError(
                f"cannot write to {quote(folder)}: {reason(error)}",
                field="report",
                remedy="name a folder that you may write to",
            ) from error


# ---- parts -------------------------------------------------------------------------------------------------------


def proposed_ratios(found: Findings) -> Ratios | None:
    """The mean over layers that attend to all keys: only those can be partitioned."""
    spreads = [
        spread
        for layer, spread in enumerate(found.statistics.visual_spread())
        if spread is not None and _is_full(found, layer)
    ]
    return Ratios.of(sum(column) / len(spreads) for column in zip(*spreads, strict=True)) if spreads else None


def stored_bytes(found: Findings) -> tuple[list[int], list[int]]:
    """Bytes that each layer stores of a token: keys alone, keys and values; 0 for layers that were not observed."""
    layers = [found.layers.get(number) for number in range(found.statistics.layers)]
    keys = [0 if s is None else s.kv_heads * s.head_dim * _itemsize(s) for s in layers]
    both = [0 if s is None else s.kv_heads * (s.head_dim + s.value_dim) * _itemsize(s) for s in layers]
    return keys, both


def _itemsize(layer: ObservedLayer) -> int:
    import torch

    dtype: torch.dtype = getattr(torch, layer.dtype.removeprefix("torch."))
    return dtype.itemsize


def _is_full(found: Findings, layer: int) -> bool:
    return layer in found.layers and found.layers[layer].kind == "full"


def _layers(found: Findings, matrix: list[list[float]], blocks: tuple[Block, ...]) -> Iterable[LayerFinding]:
    anchor_of = {layer: first for first, last in blocks for layer in range(first + 1, last + 1)}
    anchors = {first for first, _ in blocks}
    masses, spreads = found.statistics.visual_mass(), found.statistics.visual_spread()
    for layer, (mass, spread) in enumerate(zip(masses, spreads, strict=True)):
        anchor = anchor_of.get(layer)
        yield LayerFinding(
            layer=layer,
            kind=found.layers[layer].kind if layer in found.layers else None,
            role="anchor" if layer in anchors else "dense" if anchor is None else "lazy",
            anchor=anchor,
            divergence_before=_finite(matrix[layer - 1][layer]) if layer else None,
            divergence_anchor=None if anchor is None else matrix[anchor][layer],
            visual_mass=mass,
            visual_spread=None if spread is None else {f"{m:g}": s for m, s in zip(MASSES, spread, strict=True)},
            ratios=Ratios.of(spread) if spread is not None and _is_full(found, layer) else None,
            excluded=found.excluded.get(layer),
        )


def _savings(found: Findings, blocks: tuple[Block, ...], mode: str) -> PredictedSavings:
    keys, both = stored_bytes(found)
    all_lazy = [layer for first, last in blocks for layer in range(first + 1, last + 1)]
    lazy = all_lazy if mode == "gla" else []
    return PredictedSavings(
        lazy_layers=len(all_lazy),
        layers=found.statistics.layers,
        kv_bytes_before=sum(both),
        kv_bytes_after=sum(both) - sum(keys[layer] for layer in lazy),
        linears_before=found.linears,
        linears_after=found.linears - sum(found.layers[layer].linears for layer in lazy),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value
