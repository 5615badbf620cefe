"""How every benchmark reports: a table for people, a JSON file for comparison, and the machine it ran on."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
console = Console()


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": transformers.__version__,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and count of a list of timings, in milliseconds."""
    quartiles = statistics.quantiles(seconds, n=4)
    return {
        "median_ms": round(statistics.median(seconds) * 1e3, 4),
        "q1_ms": round(quartiles[0] * 1e3, 4),
        "q3_ms": round(quartiles[2] * 1e3, 4),
        "count": len(seconds),
    }


def save(name: str, rows: Sequence[dict[str, Any]], size: Sequence[str] = ()) -> Path:
    """Write ``rows`` and the machine to ``benchmarks/results/<name>.json``.

    Args:
        name: of the benchmark.
        rows: what was measured.
        size: keys that tell rows of a grid apart. What the file says of other sizes stays, with the ``machine`` that it
            was measured on where that is another one.
    """
    RESULTS.mkdir(exist_ok=True)
    path, here = RESULTS / f"{name}.json", machine()
    kept: list[dict[str, Any]] = []
    if size and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        measured = [[row[key] for key in size] for row in rows]
        others = [row for row in before["rows"] if [row[key] for key in size] not in measured]
        kept = [{"machine": before["machine"], **row} for row in others]
        kept = [{k: v for k, v in row.items() if k != "machine" or v != here} for row in kept]
    everything = sorted([*kept, *rows], key=lambda row: [row[key] for key in size])
    path.write_text(json.dumps({"machine": here, "rows": everything}, indent=1) + "\n", encoding="utf-8")
    return path
