"""What benchmarks write down."""

import json
from pathlib import Path

import pytest

from benchmarks import _decoding, _report


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_report, "RESULTS", tmp_path)
    monkeypatch.setattr(_report, "machine", lambda: {"processor": "here"})
    return tmp_path / "some.json"


def test_what_was_measured_elsewhere_stays_and_says_where(results: Path):
    before = {
        "machine": {"processor": "there"},
        "rows": [{"heads": 4, "batch": 1, "ms": 3.0}, {"heads": 4, "batch": 8, "ms": 5.0}],
    }
    results.write_text(json.dumps(before))
    _report.save("some", [{"heads": 4, "batch": 8, "ms": 4.0}, {"heads": 2, "batch": 1, "ms": 1.0}], ("heads", "batch"))
    assert json.loads(results.read_text()) == {
        "machine": {"processor": "here"},
        "rows": [
            {"heads": 2, "batch": 1, "ms": 1.0},
            {"machine": {"processor": "there"}, "heads": 4, "batch": 1, "ms": 3.0},
            {"heads": 4, "batch": 8, "ms": 4.0},
        ],
    }


def test_a_row_keeps_its_machine_and_loses_it_at_home(results: Path):
    rows = [{"machine": {"processor": "far"}, "batch": 1}, {"machine": {"processor": "here"}, "batch": 2}]
    results.write_text(json.dumps({"machine": {"processor": "there"}, "rows": rows}))
    _report.save("some", [{"batch": 4}], ("batch",))
    kept = json.loads(results.read_text())["rows"]
    assert kept == [{"machine": {"processor": "far"}, "batch": 1}, {"batch": 2}, {"batch": 4}]


def test_without_sizes_a_file_is_written_anew(results: Path):
    _report.save("some", [{"batch": 1}])
    _report.save("some", [{"batch": 2}])
    assert json.loads(results.read_text())["rows"] == [{"batch": 2}]


def test_a_refresh_counts_in_every_period():
    """A median of steps would be that of those that do not refresh: two in three."""
    assert _decoding.periods([1.0, 4.0, 1.0, 1.0, 4.0, 1.0, 9.0]) == [2.0, 2.0]
