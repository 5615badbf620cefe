"""The Triton kernels: every case of `_triton_cases.py`, interpreted on the CPU and compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).parent / "_triton_cases.py"
PARTS = {
    "decode": "test_decode",
    "latents": "test_latent",
    "anchors and lazy layers": "test_anchor or test_inherited",
    "scores, moves and choices": "test_scores or test_moves or test_reselects",
}


def run_cases(chosen: str, marked: str = "", **environment: str) -> None:
    """Those cases whose names match ``chosen`` and whose marks match ``marked``, as `pytest -k` and `-m` take them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        chosen,
        "-m",
        marked,
        str(CASES),
    ]
    result = subprocess.run(
        command, cwd=CASES.parents[2], env={**os.environ, **environment}, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part: str) -> None:
    pytest.importorskip("triton")
    run_cases(PARTS[part], "not matrix", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.matrix
@pytest.mark.parametrize("part", PARTS)
def test_the_rest_interpreted(part: str) -> None:
    pytest.importorskip("triton")
    run_cases(PARTS[part], "matrix", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("part", PARTS)
def test_on_a_gpu(part: str) -> None:
    run_cases(PARTS[part], TRITON_INTERPRET="0")


def test_triton_is_imported_late() -> None:
    """The package works where Triton is not installed."""
    operators = ("partitioned_decode", "visual_scores", "partition", "inherited_decode", "latent_decode", "reselect")
    check = f"import sys, {', '.join(f'avl_fx.kernels.{name}' for name in operators)}\n"
    check += "assert not [name for name in sys.modules if name.endswith('.triton') and name.startswith('avl_fx')]"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=CASES.parents[2], timeout=120)
