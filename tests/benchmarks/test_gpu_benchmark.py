"""`make bench-gpu`, rehearsed on a CPU at toy sizes: the file that it writes, and what becomes of those who fail."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks._report import RESULTS
from benchmarks.gpu import __main__ as program
from benchmarks.gpu.gate import Reference, verdict
from benchmarks.gpu.results import SCHEMA, Results, compare
from benchmarks.gpu.settings import PHASES, TESTS, Cell, Settings
from benchmarks.gpu.worker import Worker

BROKEN = "tests.benchmarks._broken"
REHEARSAL: dict[str, Any] = {"device": "cpu", "tiny": True, "codegen": False, "steps": 3, "prompts": 1}
ROW = {"plan", "ours", "status"}
TIMES = {"median", "deciles", "count"}
GATE = {"against", "error", "plain_error", "allowed", "passed"}


def run(output: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    """Exit code and file of one call of the program."""
    code = 0
    try:
        program.main(output=output, **{**REHEARSAL, **options})
    except typer.Exit as end:
        code = end.exit_code
    return code, json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", sorted(RESULTS.glob("nvidia_*.json")), ids=lambda file: file.stem)
def test_what_is_committed_is_right_and_shown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    program.main(show=file)
    shown = capsys.readouterr().out
    for cell in cells:
        assert cell["complete"]
        assert cell["id"] in shown
        assert not cell.get("failed")
        assert all(row["status"] == "right" for row in cell["contenders"].values() if row["ours"])


def check_schema(data: dict[str, Any]) -> None:
    """Every figure has what a reader needs to judge it."""
    assert data["schema"] == SCHEMA
    for entry in data["runs"]:
        machine = entry["machine"]
        assert {"gpu", "torch", "triton", "transformers", "commit", "sources", "processor"} <= set(machine)
        assert entry["settings"]["layers"] == 2
    for cell in data["cells"]:
        assert cell["id"].split("/")[0] in PHASES
        assert 0 <= cell["run"] < len(data["runs"])
        assert cell["complete"]
        assert cell["seconds"] > 0
        assert cell["facts"]["copy_bytes_per_second"] > 0
        assert "fastest_baseline" in cell
        for row in cell["contenders"].values():
            check_row(row, cell)


def parts(gate: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdicts that it is made of, the exact one first."""
    return [gate["float32"], gate["measured"]] if "float32" in gate else [gate]


def check_row(row: dict[str, Any], cell: dict[str, Any]) -> None:
    assert set(row) >= ROW
    assert row["plan"] in ("dense", "partitioned")
    if row["status"] == "failed":
        assert row["reason"]
        assert "ms" not in row
        return
    for gate in parts(row["gate"]):
        assert set(gate) >= GATE
    assert row["gate"]["passed"] == (row["status"] == "right")
    assert set(row["ms"]) == TIMES
    assert len(row["ms"]["deciles"]) == 9
    assert row["ms"]["median"] > 0
    if row["status"] == "wrong":
        assert row["gate"]["reason"]
        assert not {"over", "over_fastest", "bytes_per_second", "of_copy"} & set(row), (
            "nothing is said of what is wrong"
        )
        return
    if row["plan"] == "partitioned" and not cell["id"].startswith("prefill"):
        exactly = parts(row["gate"])[0]
        assert exactly["dense_error"] > 2 * exactly["allowed"], "the gate can tell"
    if row["ours"]:
        over = {n: other for n, other in cell["contenders"].items() if not other["ours"] and other["status"] == "right"}
        assert set(row["over"]) == set(over)
        for name, ratio in row["over"].items():
            assert ratio == pytest.approx(over[name]["ms"]["median"] / row["ms"]["median"], rel=0.01, abs=1e-3)
    if "bytes" in row:
        achieved = row["bytes"] / row["ms"]["median"] * 1e3
        assert row["bytes_per_second"] == pytest.approx(achieved, rel=1e-3)
        assert row["of_copy"] == pytest.approx(achieved / cell["facts"]["copy_bytes_per_second"], rel=0.01, abs=1e-3)


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_a_rehearsal_and_those_who_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders that raise, end their process or give wrong logits are lines in the file; the others are measured."""
    output = tmp_path / "gpu.json"
    options: dict[str, Any] = {
        "only": ["decode/tiny-llava/1", "prefill/tiny-qwen2.5-vl/3", "attention/tiny-qwen2.5-vl/3"],
        "contender": ["eager, *", "partitioned, static", "SDPA*", "partitioned_decode*", "broken: [rel]*"],
        "extra": [BROKEN],
        "dtype": "float32",
    }
    code, data = run(output, **options)
    check_schema(data)
    cells = {cell["id"]: cell for cell in data["cells"]}
    assert sorted(cells) == sorted(options["only"])
    statuses = {n: row["status"] for cell in cells.values() for n, row in cell["contenders"].items()}
    broken = {name: status for name, status in statuses.items() if name.startswith("broken")}
    assert broken == {"broken: raises": "failed", "broken: ends": "failed", "broken: lies": "wrong"}
    assert {status for name, status in statuses.items() if name not in broken} == {"right"}
    decode = cells["decode/tiny-llava/1"]
    assert "OutOfMemoryError: tried to allocate" in decode["contenders"]["broken: raises"]["reason"]
    assert "exit code 7" in decode["contenders"]["broken: ends"]["reason"]
    sites = decode["contenders"]["partitioned, static"]["sites"]
    assert sum(sites.values()) == 2
    assert all(action.startswith("partitioned") for action in sites)
    assert decode["fastest_baseline"].startswith("eager"), "whoever is wrong or ours is no baseline"
    assert cells["prefill/tiny-qwen2.5-vl/3"]["contenders"]["partitioned, static"]["gate"]["rows_moved"] is True
    assert code == 1, "ours are not all right"

    def no_worker(self: Worker) -> None:
        raise AssertionError("everything is in the file already")

    monkeypatch.setattr(Worker, "_start", no_worker)
    assert run(output, **options) == (1, data), "a second call finds all of it, the failures too"


def test_a_contender_that_hangs_is_given_up() -> None:
    settings = Settings("cpu", tiny=True, layers=2, steps=3, codegen=False, extra=(BROKEN,))
    worker, cell = Worker(settings, timeout=60), Cell("decode", "tiny-llava", 1)
    try:
        assert "facts" in worker.prepare(cell)
        worker._timeout = 1.0
        assert worker.measure(cell, "broken: hangs") == {"reason": "timed out: no answer within 1 seconds"}
        assert worker._process is None
    finally:
        worker.close()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_everything_through_inductor(tmp_path: Path) -> None:
    """All contenders of all phases, as on a GPU, in bfloat16. A baseline may fail here; ours may not."""
    code, data = run(
        tmp_path / "gpu.json", only=["*llava/3", "*qwen2.5-vl/3"], codegen=True, contender=["[!b]*"], timeout=900.0
    )
    check_schema(data)
    assert len(data["cells"]) == 6
    assert code == 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as end:
        program.main()
    assert end.value.exit_code == program.NO_GPU
    assert "no GPU is visible" in capsys.readouterr().out


def test_what_it_asks_for(tmp_path: Path) -> None:
    for wrong, message in (
        ({"output": None}, "give --output"),
        ({"steps": 4}, "multiple of 3"),
        ({"only": ["decode/gpt"]}, "no cell has such a name"),
    ):
        options = {**REHEARSAL, "output": tmp_path / "gpu.json", **wrong}
        with pytest.raises(typer.BadParameter, match=message):
            program.main(**options)


def test_the_grid_is_that_of_the_models() -> None:
    ids = [cell.id for cell in program.cells(Settings())]
    assert ids[0] == TESTS.id
    models = ("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b")
    wanted = dict.fromkeys(PHASES, models)
    wanted["decode"] += ("deepseek-vl2-small",)
    assert ids[1:] == [
        f"{phase}/{model}/{batch}" for phase in PHASES for model in wanted[phase] for batch in (1, 8, 32)
    ]


# ---- time, and what is in the file already ---------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells are "measured" at once; their ids are collected."""
    measured: list[str] = []

    def measure(cell: Cell, names: list[str], entry: dict[str, Any], worker: Worker, results: Results) -> None:
        measured.append(cell.id)
        row = {"plan": "dense", "ours": True, "status": "right", "ms": {"median": 1.0, "deciles": [1.0] * 9}}
        entry["contenders"] = dict.fromkeys(names, row)
        entry["complete"] = True

    monkeypatch.setattr(program, "_measure", measure)
    return measured


def test_no_cell_is_begun_that_may_not_end(quick: list[str], tmp_path: Path, capsys: Any) -> None:
    run_quick(tmp_path, only=["decode/*"], budget=program.FIRST_ESTIMATE - 1)
    assert quick == []
    assert "run this again to continue" in capsys.readouterr().out
    run_quick(tmp_path, only=["decode/*"], budget=program.FIRST_ESTIMATE + 100)
    assert quick == [f"decode/{model}/{batch}" for model in program.TINY for batch in (1, 3)]


def run_quick(folder: Path, **options: Any) -> dict[str, Any]:
    code, data = run(folder / "gpu.json", **options)
    assert code == 0
    return data


def test_what_is_missing_is_measured(quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_quick(tmp_path, only=["decode/tiny-llava/1"])
    run_quick(tmp_path, only=["decode/tiny-llava/*"])
    assert quick == ["decode/tiny-llava/1", "decode/tiny-llava/3"]
    run_quick(tmp_path, only=["decode/tiny-llava/1"], again=True)
    assert quick[2:] == ["decode/tiny-llava/1"]
    run_quick(tmp_path, only=["decode/tiny-llava/1"], dtype="float32")
    assert quick[3:] == ["decode/tiny-llava/1"], "other settings"
    describe = program.describe
    monkeypatch.setattr(program, "describe", lambda *args: {**describe(*args), "sources": "others"})
    data = run_quick(tmp_path, only=["decode/tiny-llava/*"], dtype="float32")
    assert quick[4:] == ["decode/tiny-llava/1", "decode/tiny-llava/3"], "other sources"
    assert len(data["runs"]) == 1, "runs of which nothing is left go"
    assert [cell["run"] for cell in data["cells"]] == [0, 0]


def test_failures_are_tried_again_when_asked(tmp_path: Path) -> None:
    entry = {"complete": True, "contenders": {"a": {"status": "failed"}}}
    assert program._is_complete(entry, ["a"], retry=False)
    assert not program._is_complete(entry, ["a"], retry=True)
    assert not program._is_complete(entry, ["a", "b"], retry=False)
    assert not program._is_complete({**entry, "complete": False}, ["a"], retry=False)


# ---- the gate --------------------------------------------------------------------------------------------------------


def test_the_gate() -> None:
    exact = torch.linspace(-8, 8, 64)
    plain = exact + 0.02
    reference = Reference("itself", exact, plain)
    allowed = 3 * 0.02 + 8 * torch.finfo(torch.bfloat16).eps
    found = verdict(exact + 0.1, reference, torch.bfloat16)
    assert found["passed"]
    assert found["allowed"] == pytest.approx(allowed, rel=1e-3)
    assert found["error"] == pytest.approx(0.1, rel=1e-3)
    wrong = verdict(exact + 0.2, reference, torch.bfloat16)
    assert not wrong["passed"]
    assert "off by 0.2" in wrong["reason"]
    assert not verdict(exact + 0.001, Reference("itself", exact, exact), torch.float32)["passed"]
    nan = exact.clone()
    nan[3] = math.nan
    assert verdict(nan, reference, torch.bfloat16)["error"] is None
    assert not verdict(nan, reference, torch.bfloat16)["passed"]


def test_a_gate_that_cannot_tell_is_red() -> None:
    exact = torch.linspace(-8, 8, 64)
    for distance, passes in ((0.05, False), (1.0, True)):
        found = verdict(exact, Reference("a plan", exact, exact + 0.01, dense=exact + distance), torch.bfloat16)
        assert found["passed"] is passes
        assert passes or "tells nothing" in found["reason"]


def test_ratios_are_taken_over_what_is_right() -> None:
    def row(median: float, ours: bool, status: str = "right", plan: str = "dense") -> dict[str, Any]:
        return {"status": status, "ours": ours, "plan": plan, "ms": {"median": median}, "bytes": 1000}

    entry: dict[str, Any] = {
        "contenders": {
            "eager": row(4.0, ours=False),
            "Inductor": row(3.0, ours=False),
            "too fast to be right": row(1.0, ours=False, status="wrong"),
            "flex, core": row(2.5, ours=False, plan="partitioned"),
            "partitioned": row(2.0, ours=True, plan="partitioned"),
            "wrong": row(0.1, ours=True, status="wrong"),
            "failed": {"status": "failed", "ours": True, "plan": "dense", "reason": "no memory"},
        }
    }
    compare(entry, copy_speed=1e6)
    rows = entry["contenders"]
    assert entry["fastest_baseline"] == "Inductor"
    assert rows["partitioned"]["over"] == {"eager": 2.0, "Inductor": 1.5, "flex, core": 1.25}
    assert rows["partitioned"]["over_fastest"] == 1.5
    assert (rows["partitioned"]["bytes_per_second"], rows["partitioned"]["of_copy"]) == (500_000, 0.5)
    for name in ("wrong", "failed", "too fast to be right"):
        assert not {"over", "over_fastest", "of_copy"} & set(rows[name])
