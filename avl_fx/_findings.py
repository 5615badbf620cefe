"""What a calibration has found out after some batches; can be saved and gone on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avl_fx._messages import quote
from avl_fx._planfile import reason
from avl_fx._prompt_rows import PromptRows
from avl_fx.errors import CalibrationError
from avl_fx.passes.context import ObservedLayer
from avl_fx.similarity import Statistics

__all__ = ["Findings", "fingerprint", "load", "save"]

VERSION = 1
"""Of the state file."""
_SAMPLED = 16
"""Elements of each parameter that tell one checkpoint from another."""


@dataclass
class Findings:
    """Sums over batches, and what was seen of the decoder."""

    statistics: Statistics
    batches: int = 0
    layers: dict[int, ObservedLayer] = field(default_factory=dict)
    """Layers that were observed; `rows` is ``None``."""
    excluded: dict[int, str] = field(default_factory=dict)
    apart: dict[tuple[int, int], str] = field(default_factory=dict)
    linears: int = 0
    """Linear calls of the decoder."""
    cross: bool = False

    @classmethod
    def of(cls, first: PromptRows) -> Findings:
        """Nothing summed up yet, for a decoder as deep as that of the ``first`` prompt."""
        seen = [*first.rows, *first.attention.excluded]
        return cls(Statistics.empty(max([*(n + 1 for n in seen), first.attention.depth or 0])))

    def add(self, prompt: PromptRows) -> None:
        """Take in one batch."""
        attention = prompt.attention
        self.statistics.add(prompt.rows, attention.apart, prompt.visual, prompt.keys)
        for layer in attention.layers:
            self.layers.setdefault(layer.layer, replace(layer, rows=None))
        for number, why in attention.excluded.items():
            self.excluded.setdefault(number, why)
        for pair, why in attention.apart.items():
            self.apart.setdefault(pair, why)
        self.linears, self.cross = prompt.linears, attention.cross
        self.batches += 1


# ---- the state file ----------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module, compiler: str) -> str:
    """32 hex digits for what the sums depend on besides the batches: the model, a few of its weights, the compiler.

    The target, the mode and the limit are no part of it: a saved state answers any of them.
    """
    found = hashlib.sha256(f"{VERSION} {type(model).__qualname__} {compiler}".encode())
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.numel() and parameter.device.type != "meta":
            line = parameter.detach()[(0,) * (parameter.dim() - 1)] if parameter.dim() else parameter.detach()
            found.update(str(line.reshape(-1)[:_SAMPLED].tolist()).encode())
    return found.hexdigest()[:32]


def save(findings: Findings, path: Path, mark: str) -> None:
    """Write ``findings`` to ``path``, whole or not at all.

    Args:
        findings: what to write.
        path: a safetensors file; its header holds a JSON object under ``avl_fx``.
        mark: the `fingerprint` of the run.

    Raises:
        CalibrationError: the file cannot be written.
    """
    header = {
        "version": VERSION,
        "fingerprint": mark,
        "batches": findings.batches,
        "samples": findings.statistics.samples,
        "layers": [asdict(layer) for layer in findings.layers.values()],
        "excluded": sorted(findings.excluded.items()),
        "apart": sorted([*pair, why] for pair, why in findings.apart.items()),
        "linears": findings.linears,
        "cross": findings.cross,
    }
    save_file = _safetensors("save_file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(findings.statistics.tensors(), written, metadata={"avl_fx": json.dumps(header)})
            os.replace(written, path)
        finally:
            written.unlink(missing_ok=True)
    except OSError as error:
        raise CalibrationError(
            f"cannot write {quote(path)}: {reason(error)}", field="state", remedy="name a file that you may write to"
        ) from error


def load(path: Path, mark: str) -> Findings | None:
    """What an earlier run saved; ``None`` where there is no file yet.

    Raises:
        CalibrationError: not a state file, or that of another model or compiler.
    """
    if path.is_dir():
        raise CalibrationError(f"{quote(path)} is a directory", field="state", remedy="name a file in it")
    if not path.exists():
        return None
    safe_open = _safetensors("safe_open")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["avl_fx"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        theirs = header["fingerprint"] if header["version"] == VERSION else None
        findings = None if theirs != mark else _read(header, tensors)
    except OSError as error:
        raise CalibrationError(
            f"cannot read {quote(path)}: {reason(error)}", field="state", remedy="name a file that you may read"
        ) from error
    except Exception as error:
        raise CalibrationError(
            f"{quote(path)} is no state of a calibration: {type(error).__name__}",
            field="state",
            remedy="delete it, or name another file",
        ) from error
    if findings is None:
        raise CalibrationError(
            f"{quote(path)} was saved by a run with another model, other weights, another compiler or another version",
            field="state",
            remedy="delete it to start anew, or name another file",
        )
    return findings


def _read(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Findings:
    layers = [ObservedLayer(**layer) for layer in header["layers"]]
    return Findings(
        Statistics.of(header["samples"], tensors),
        header["batches"],
        {layer.layer: layer for layer in layers},
        dict(header["excluded"]),
        {(earlier, later): why for earlier, later, why in header["apart"]},
        header["linears"],
        header["cross"],
    )


def _safetensors(name: str) -> Callable[..., Any]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise CalibrationError(
            "a state is saved with safetensors, which is not installed",
            field="state",
            remedy="pip install 'avl-fx[calibrate]'",
        ) from error
    found: Callable[..., Any] = getattr(safetensors.torch, name, None) or getattr(safetensors, name)
    return found
