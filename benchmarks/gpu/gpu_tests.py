"""The tests with the marker `gpu`, as a cell of their own: which of them passed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.environment import ROOT

__all__ = ["run_gpu_tests"]

MOST_WORKERS = 6


def run_gpu_tests(timeout: float, chosen: str = "gpu") -> dict[str, Any]:
    """Run the tests with the marker ``chosen`` and count; ``complete`` unless they could not be run to their end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", chosen, "-q", "-p", "no:cacheprovider", *_in_parallel()]
        try:
            code = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, timeout=timeout, check=False).returncode
        except subprocess.TimeoutExpired:
            return {"complete": False, "reason": f"timed out after {timeout:.0f} seconds"}
        if code not in (0, 1) or not report.exists():
            return {"complete": False, "reason": f"pytest ended with exit code {code}"}
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes: dict[str, list[str]] = {"passed": [], "failure": [], "error": [], "skipped": []}
    for case in cases:
        outcome = next((child.tag for child in case if child.tag in outcomes), "passed")
        outcomes[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    return {
        "complete": True,
        "passed": len(outcomes["passed"]),
        "skipped": len(outcomes["skipped"]),
        "failed": sorted(outcomes["failure"] + outcomes["error"]),
    }


def _in_parallel() -> list[str]:
    """Most of their time is compilation, so several share the GPU."""
    workers = min(MOST_WORKERS, (os.cpu_count() or 1) // 2)
    return ["-n", str(workers), "--dist", "worksteal"] if workers > 1 and find_spec("xdist") else []
