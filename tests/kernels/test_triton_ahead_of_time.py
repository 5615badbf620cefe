"""Every Triton kernel compiles for every GPU that we mean to serve, none of which has to be there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton.runtime import JITFunction

from avl_fx import kernels
from avl_fx.kernels.ahead_of_time import SPECIMENS, TARGETS, compile_launch, launches, main

FEW_BYTES = 64
"""Of a thread's stack: a few words, which ptxas may choose over a register that would cost occupancy."""
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that a program may take; sm_80 stands for sm_86 and sm_89 as well, which have less."""
TABLE = Path(__file__).parents[2] / "benchmarks/results/kernels_ahead_of_time.json"
FIRST = {operator: name for name, (operator, _) in reversed(SPECIMENS.items())}


def _mark(operator: str, name: str, target: str) -> tuple[pytest.MarkDecorator, ...]:
    """Of each operator `make test` compiles one specimen, for every other target."""
    if FIRST[operator] != name:
        return (pytest.mark.slow,)
    place = [*FIRST].index(operator) + [*TARGETS].index(target)
    return (pytest.mark.matrix,) if place % 2 else ()


CASES = [
    pytest.param(name, target, marks=_mark(operator, name, target), id=f"{operator}-{name}-{target}")
    for name, (operator, _) in SPECIMENS.items()
    for target in TARGETS
]


@pytest.mark.parametrize(("specimen", "target"), CASES)
def test_compiles(specimen: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in launches(specimen, target):
        row = compile_launch(launch, target)
        assert row["binary_bytes"] > 0, launch.name
        assert row["spills"] <= FEW_BYTES, f"{launch.name}: registers spill to memory"
        assert row["shared_bytes"] <= SHARED[target], f"{launch.name}: it could not be launched"
        assert 0 < row["registers"] <= 255 if target.startswith("sm") else 0 < row["registers"] <= 512


def test_every_kernel_has_a_specimen() -> None:
    """A Triton kernel that nobody compiles for GPUs that are not there has never been compiled for them."""
    operators = {file.parent.name for file in Path(kernels.__file__).parent.glob("*/triton.py")}
    assert operators == {operator for operator, _ in SPECIMENS.values()}
    for operator in operators:
        module = importlib.import_module(f"avl_fx.kernels.{operator}.triton")
        # What others call inside of a kernel starts with an underscore, and is compiled with them.
        jitted = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and name[0] != "_"}
        launched = {launch.kernel.fn.__name__ for launch in launches(FIRST[operator])}
        assert jitted <= launched


def test_the_recorded_table_has_every_kernel() -> None:
    """`python -m avl_fx.kernels.ahead_of_time benchmarks/results/kernels_ahead_of_time.json` writes it."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    recorded = {(row["kernel"], row["specimen"], row["target"]) for row in rows}
    launched = [launch for specimen in SPECIMENS for launch in launches(specimen)]
    assert recorded == {(each.kernel.fn.__name__, each.specimen, target) for each in launched for target in TARGETS}
    for row in rows:
        assert row["registers"] > 0
        assert row["spills"] <= FEW_BYTES
        assert 0 <= row["shared_bytes"] <= SHARED[row["target"]]


def test_the_table_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avl_fx.kernels.ahead_of_time.SPECIMENS", {"bfloat16": SPECIMENS["bfloat16"]})
    main([str(tmp_path / "table.json")])
    rows = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert {row["target"] for row in rows} == set(TARGETS)
    assert {row["kernel"] for row in rows} == {"gather_kernel", "scatter_kernel"}
