"""Which tests there are: ``python -m tests.mutations._collect FILE...`` prints the marks of each as JSON."""

from __future__ import annotations

import json
import sys

import pytest


class _Marks:
    found: dict[str, list[str]]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.found = {item.nodeid: [mark.name for mark in item.iter_markers()] for item in session.items}


def main(files: list[str]) -> int:
    marks = _Marks()
    # The last line is the answer: pytest prints before it.
    code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *files], plugins=[marks])
    print(json.dumps(marks.found))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
