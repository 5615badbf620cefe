"""What a figure depends on: the machine, the versions, and the sources that were run."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks._report import machine

__all__ = ["describe", "same"]

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("avl_fx", "passes", "kernels", "benchmarks", "tests/oracle")
"""Folders whose sources decide what is measured."""
DECIDES = ("gpu", "torch", "triton", "transformers", "sources")


def describe(device: str, commit: str | None = None) -> dict[str, Any]:
    """Machine, versions and sources as plain data; what cannot be found out is ``None``.

    Args:
        device: where things are measured.
        commit: of the sources, where git is not at hand.
    """
    facts = machine()
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "architecture": getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "hip": getattr(torch.version, "hip", None),
        }
    else:
        facts["gpu"] = None
    return {**facts, "commit": commit or _commit(), "sources": _sources()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether figures of both may stand beside one another."""
    return all(one.get(name) == other.get(name) for name in DECIDES)


def _commit() -> str | None:
    found = _output("git", "rev-parse", "HEAD")
    return f"{found}, changed" if found and _output("git", "status", "--porcelain", "-uno") else found


def _sources() -> str:
    """A digest of everything that is run; results and notes do not count."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cpp", ".h"):
                digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
