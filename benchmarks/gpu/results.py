"""The one JSON file: written after every contender, so that a run that is cut short is continued and not repeated."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.environment import same
from benchmarks.gpu.settings import Cell

__all__ = ["SCHEMA", "Results", "compare"]

SCHEMA = 1


class Results:
    """Runs, each with its machine and settings, and cells, each measured in one of them.

    Schema: ``{"schema", "runs": [{"started", "machine", "settings"}], "cells": [{"id", "run", "complete", "seconds",
    "facts", "contenders": {name: {"status", "plan", "ours", "gate", "ms", ...}}}]}``. ``status`` is ``right``,
    ``wrong`` (the gate is red: no ratio), or ``failed`` with a ``reason``.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path = path
        self._data: dict[str, Any] = {"schema": SCHEMA, "runs": [], "cells": []}
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.get("schema") == SCHEMA:
                self._data = stored
        self._runs, self._cells = self._data["runs"], self._data["cells"]
        self.run = run
        self._number = len(self._runs)
        self._runs.append(run)

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """What is known of ``cell`` from a run like this one."""
        found = next((each for each in self._cells if each["id"] == cell.id), None)
        return found if found is not None and self._comparable(self._runs[found["run"]]) else None

    def begin(self, cell: Cell) -> dict[str, Any]:
        """An empty entry for ``cell`` in the place of an older one."""
        entry: dict[str, Any] = {"id": cell.id, "run": self._number, "complete": False, "contenders": {}}
        self._cells[:] = [each for each in self._cells if each["id"] != cell.id] + [entry]
        return entry

    def save(self) -> None:
        """Write the file; whoever reads it finds the old or the new one, whole. Runs of which nothing is left go."""
        used = {each["run"] for each in self._cells}
        order = {old: new for new, old in enumerate(sorted(used))}
        cells = [{**each, "run": order[each["run"]]} for each in self._cells]
        data = {"schema": SCHEMA, "runs": [self._runs[old] for old in order], "cells": cells}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def _comparable(self, run: dict[str, Any]) -> bool:
        return same(run["machine"], self.run["machine"]) and run["settings"] == self.run["settings"]


def compare(entry: dict[str, Any], copy_speed: float) -> None:
    """Ratios and achieved bytes of all that is right in one finished cell.

    ``over``: the time of each baseline over ours. ``over_fastest``: of the fastest baseline that reads every key, as
    the model itself does. Nothing is said of what is wrong, or over what is wrong.
    """
    right = {name: row for name, row in entry["contenders"].items() if row["status"] == "right"}
    baselines = {name: row for name, row in right.items() if not row["ours"]}
    dense = {name: row["ms"]["median"] for name, row in baselines.items() if row["plan"] == "dense"}
    fastest = min(dense, key=lambda name: dense[name], default=None)
    entry["fastest_baseline"] = fastest
    for row in right.values():
        median = row["ms"]["median"]
        if "bytes" in row:
            row["bytes_per_second"] = round(row["bytes"] / median * 1e3)
            row["of_copy"] = round(row["bytes_per_second"] / copy_speed, 4)
        if row["ours"]:
            row["over"] = {name: round(other["ms"]["median"] / median, 3) for name, other in baselines.items()}
            if fastest is not None:
                row["over_fastest"] = round(dense[fastest] / median, 3)
