"""Wording that the plan and the options share: values as users see them, and near misses."""

import difflib
import reprlib
from collections.abc import Iterable

__all__ = ["near_miss", "quote", "show", "unknown_name_remedy"]


def show(value: object) -> str:
    """Type and shortened repr of a value, as in ``str '3'``."""
    return "None" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def quote(text: object) -> str:
    """A path or a name in quotes; the middle of a very long one is left out."""
    text = str(text)
    return repr(text if len(text) <= 200 else f"{text[:95]}...{text[-95:]}")


def near_miss(word: object, known: Iterable[str]) -> str | None:
    """The known name that `word` was probably meant to be, if any comes close."""
    matches = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name_remedy(word: object, known: Iterable[str], what: str = "keys") -> str:
    """Advice on an unknown name: the nearest known one when there is one, and the whole (short) list."""
    known = list(known)
    meant = near_miss(word, known)
    listing = f"the {what} are: {', '.join(known)}"
    return listing if meant is None else f"did you mean {meant!r}? ({listing})"
