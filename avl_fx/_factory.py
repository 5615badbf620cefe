"""Model factories named on the command line: ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from avl_fx._messages import near_miss, quote, show
from avl_fx.errors import OptionError
from avl_fx.evaluate import EvaluationTask

__all__ = ["call_calibration_factory", "call_evaluation_factory", "call_factory"]

_FIELD = "--factory"


def call_factory(spec: str) -> tuple[nn.Module, dict[str, Any]]:
    """Import and call ``spec``, which takes nothing and returns ``(model, inputs)``.

    The current folder is searched first, as with ``python -m``.

    Raises:
        OptionError: not of that form, no such module or function, or something else is returned.

    Whatever the module or the function raises is passed on.
    """
    made = _function(spec, "(model, inputs)")()
    if not _is_pair(made) or not isinstance(made[1], Mapping):
        raise OptionError(
            f"{quote(spec)} must return (model, inputs), it returned {show(made)}",
            field=_FIELD,
            remedy="return a torch.nn.Module and a dict of its keyword arguments",
        )
    return made[0], dict(made[1])


def call_calibration_factory(spec: str, paths: list[Path] | None = None) -> tuple[nn.Module, Iterable[Any]]:
    """Import and call ``spec``, which returns ``(model, batches)``; it is given ``paths`` where there are any.

    Raises:
        OptionError: as `call_factory`; or it takes no ``paths``, or asks for them and there are none.
    """
    function = _function(spec, "(model, batches)")
    arguments = [] if paths is None else [paths]
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        raise OptionError(
            f"{quote(spec)} must take {'nothing' if paths is None else 'one argument, the list of paths'}",
            field=_FIELD,
            remedy="give --images DIR, or drop its parameters" if paths is None else "write def make(paths): ...",
        ) from None
    made = function(*arguments)
    if not _is_pair(made) or isinstance(made[1], Mapping) or not isinstance(made[1], Iterable):
        raise OptionError(
            f"{quote(spec)} must return (model, batches), it returned {show(made)}",
            field=_FIELD,
            remedy="return a torch.nn.Module and an iterable of dicts of its keyword arguments",
        )
    return made


def call_evaluation_factory(spec: str) -> tuple[nn.Module, EvaluationTask]:
    """Import and call ``spec``, which takes nothing and returns ``(model, task)``.

    Raises:
        OptionError: as `call_factory`.
    """
    made = _function(spec, "(model, task)")()
    if not _is_pair(made) or not isinstance(made[1], EvaluationTask):
        raise OptionError(
            f"{quote(spec)} must return (model, task), it returned {show(made)}",
            field=_FIELD,
            remedy="return a torch.nn.Module and an avl_fx.EvaluationTask",
        )
    return made


def _is_pair(made: Any) -> bool:
    return isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)


def _function(spec: str, returns: str) -> Callable[..., Any]:
    """What ``spec`` names."""
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise OptionError(
            f"must be module:function, got {quote(spec)}",
            field=_FIELD,
            remedy=f"name a function that returns {returns}, for example my_models:llava",
        )
    module = _from_file(Path(where)) if where.endswith(".py") else _from_name(where)
    function = getattr(module, name, None)
    if not callable(function):
        meant = near_miss(name, [n for n in vars(module) if not n.startswith("_")])
        raise OptionError(
            f"{quote(where)} has no function {quote(name)}",
            field=_FIELD,
            remedy=f"did you mean {meant!r}?" if meant else "check its name",
        )
    return function


def _from_name(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there, and imports something that is not
        raise OptionError(
            f"there is no module {quote(name)}", field=_FIELD, remedy="check its name, or give a file: file.py:function"
        ) from error


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise OptionError(f"there is no file {quote(path)}", field=_FIELD, remedy="check its path")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
