"""The command line as tests call it."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from avl_fx.cli import app


class Command:
    """``avl`` with some first arguments."""

    def __init__(self, *first: str) -> None:
        self.first = first

    def __call__(self, *arguments: object, code: int = 0) -> Any:
        """Run it; the result of typer's runner, if it left with ``code``."""
        result = CliRunner().invoke(app, [*self.first, *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    def error_of(self, *arguments: object) -> str:
        """The one line of an error; nothing else is printed."""
        result = self(*arguments, code=2)
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr
        return str(result.stderr)
