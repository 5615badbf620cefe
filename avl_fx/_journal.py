"""What an evaluation has answered so far, line by line in a file: an interrupted run goes on behind the last line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from avl_fx._messages import quote
from avl_fx._planfile import reason
from avl_fx.errors import EvaluationError

__all__ = ["Journal"]

VERSION = 1


class Journal:
    """Records by key. The first line of the file says which run they are of."""

    def __init__(self, path: Path | None, mark: str) -> None:
        """Open, or begin, the journal of the run ``mark``; without a path it is kept in memory alone.

        Raises:
            EvaluationError: the file is of another run, is no journal, or cannot be read or written.
        """
        self.path = path
        self.records: dict[str, Any] = {}
        if path is None:
            return
        head = json.dumps({"avl_fx_journal": VERSION, "run": mark})
        try:
            if path.exists():
                self._read(path.read_text(encoding="utf-8"), head)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(head + "\n", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(
                f"cannot use {quote(path)}: {reason(error)}", field="output", remedy="name another folder"
            ) from error

    def _read(self, text: str, head: str) -> None:
        lines = text.split("\n")
        if lines[0] != head:
            known = '"avl_fx_journal"' in lines[0]
            raise EvaluationError(
                f"{quote(self.path)} holds the answers of another run"
                if known
                else f"{quote(self.path)} is no journal of an evaluation",
                field="output",
                remedy="name another folder, or delete the file to start anew",
            )
        # What stands behind the last line break was being written when the run was cut off.
        for line in lines[1:-1]:
            record = json.loads(line)
            self.records[record["key"]] = record["value"]
        if lines[-1]:
            assert self.path is not None
            self.path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")

    def add(self, key: str, value: Any) -> None:
        """Record ``value``; it is on disk when this returns."""
        self.records[key] = value
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
                file.flush()
                os.fsync(file.fileno())
