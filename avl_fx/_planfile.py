"""Reading plan files: every way in which a file can be wrong, as a `PlanFileError`."""

import json
import os
from pathlib import Path
from typing import Any

from avl_fx._messages import near_miss, quote
from avl_fx.errors import PlanError, PlanFileError

__all__ = ["parse_json", "plans_beside", "read_text", "reason"]


def read_text(path: str) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises `PlanFileError` for everything else."""
    file = Path(os.path.expanduser(path))  # unlike Path.expanduser, never raises
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanFileError(
            f"{quote(path)} is not UTF-8 text (byte {error.start})", remedy="save the plan as UTF-8 JSON", path=path
        ) from error
    except FileNotFoundError as error:
        beside = near_miss(path, plans_beside(path))
        raise PlanFileError(
            f"there is no plan file {quote(path)} (looked for {quote(file.absolute())})",
            remedy="check the path" if beside is None else f"did you mean {quote(beside)}?",
            path=path,
        ) from error
    except IsADirectoryError as error:
        raise PlanFileError(
            f"{quote(path)} is a directory", remedy="name the JSON file in it, for example plan.json", path=path
        ) from error
    except (OSError, ValueError) as error:
        raise PlanFileError(
            f"cannot read {quote(path)}: {reason(error)}", remedy="name a JSON file that you may read", path=path
        ) from error


def parse_json(text: str, path: str | None) -> Any:
    """Parse JSON that was read from `path` (``None``: given as text). Raises `PlanFileError` naming line and column."""
    source = "the plan text" if path is None else quote(path)
    if not text.strip():
        raise PlanFileError(f"{source} is empty", remedy='write at least {"version": 1}', path=path)
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise PlanFileError(
            f"{source} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            remedy="correct it there, or write the file with Plan.to_json",
            path=path,
            line=error.lineno,
            column=error.colno,
        ) from None
    except PlanError as error:
        raise PlanFileError(error.message, field=error.field, remedy=error.remedy, path=path) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise PlanFileError(
            f"{source} cannot be read as JSON: {reason(error)}", remedy="write the file with Plan.to_json", path=path
        ) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise PlanError("the key stands there twice", field=key, remedy="keep one of them")
        seen.add(key)
    return dict(pairs)


def plans_beside(path: str) -> list[str]:
    """JSON files in the folder that `path` points into, written as the user would write them."""
    folder = os.path.dirname(path)
    try:
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder or ".")) if name.endswith(".json")]
    except (OSError, ValueError):
        return []


def reason(error: BaseException) -> str:
    """What the operating system or the parser said, without its paths and numbers."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
