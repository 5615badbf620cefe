"""Typed errors. Each one names the field that is wrong, where there is one, and how to put it right.

All of them are `RuntimeError`s, pass through Dynamo unwrapped when a backend raises them, and survive pickling and
deep copies.
"""

import functools
from typing import Any

from avl_fx._compat import BackendErrorBase

__all__ = [
    "AvlError",
    "CacheStateError",
    "CalibrationError",
    "CaptureError",
    "EvaluationError",
    "InternalError",
    "ModalityError",
    "OptionError",
    "PlanError",
    "PlanFileError",
    "PlanMismatchError",
    "UnsupportedPlanError",
]


class AvlError(BackendErrorBase):
    """Base of every error that avl_fx raises on purpose.

    Args:
        message: what is wrong, in one or two sentences, without the field and without the remedy.
        field: the setting at fault, as a path such as ``lazy.blocks[1]``; ``None`` when no single one is.
        remedy: what the user can do, as an imperative; ``None`` only when nothing can be suggested.

    ``str(error)`` is ``<field>: <message>. Fix: <remedy>.``
    """

    def __init__(self, message: str, *, field: str | None = None, remedy: str | None = None) -> None:
        self.message = message
        self.field = field
        self.remedy = remedy
        super().__init__(self._text(), first_useful_frame=None)

    def __str__(self) -> str:
        # Not `self.args`: Dynamo appends advice on its own debugging switches there.
        return self._text()

    def __reduce__(self) -> tuple[Any, ...]:
        # The inherited state holds frames and tracer output, which neither pickle nor make sense elsewhere.
        state = {"__notes__": list(self.__notes__)} if hasattr(self, "__notes__") else None
        return functools.partial(type(self), **self._keywords()), (self.message,), state

    def _keywords(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this error; a subclass with more of them extends this."""
        return {"field": self.field, "remedy": self.remedy}

    def _text(self) -> str:
        text = _sentence(self.message if self.field is None else f"{self.field}: {self.message}")
        return text if self.remedy is None else f"{text} Fix: {_sentence(self.remedy)}"


class PlanError(AvlError):
    """A plan is not valid: unknown key, wrong type, value out of range, overlapping blocks."""


class PlanFileError(PlanError):
    """A plan cannot be read or written: no such file, not text, not JSON.

    Args:
        path: the file, ``None`` when the JSON was given as text.
        line, column: where the JSON stops making sense, counted from 1; ``None`` when that does not apply.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        remedy: str | None = None,
        path: str | None = None,
        line: int | None = None,
        column: int | None = None,
    ) -> None:
        self.path = path
        self.line = line
        self.column = column
        super().__init__(message, field=field, remedy=remedy)

    def _keywords(self) -> dict[str, Any]:
        return {**super()._keywords(), "path": self.path, "line": self.line, "column": self.column}


class PlanMismatchError(PlanError):
    """A valid plan was made for another model, for example for another number of layers."""


class UnsupportedPlanError(PlanError):
    """A valid plan asks for something that this version of avl_fx does not execute."""


class OptionError(AvlError):
    """A backend option is unknown, of the wrong type, or contradicts another one."""


class CaptureError(AvlError):
    """A region of a model (its decoder, its vision tower) could not be captured as a graph."""


class CacheStateError(AvlError):
    """A KV cache would be read as if it were complete although keys were dropped from it."""


class ModalityError(AvlError):
    """Modality ids are missing, or do not fit the input they describe."""


class CalibrationError(AvlError):
    """Nothing can be learned from a batch, a set of images or a saved state, or a target cannot be reached."""


class EvaluationError(AvlError):
    """An evaluation has nothing to compare, or belongs to another run."""


class InternalError(AvlError):
    """A graph pass failed. Raised in strict mode only; otherwise the untouched graph is compiled instead."""


def _sentence(text: str) -> str:
    text = text.rstrip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
