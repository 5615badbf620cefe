"""Which implementation of an operator runs: the one of its device, and no other."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["implementation", "keep_in_python"]


def implementation(name: str, table: Mapping[str, Callable[..., Any]], device: torch.device) -> Callable[..., Any]:
    """The implementation of ``name`` for ``device``.

    Raises:
        NotImplementedError: the table has none; another device's is never taken instead.
    """
    chosen = table.get(device.type)
    if chosen is None:
        raise NotImplementedError(
            f"avl::{name} has no implementation for device type {device.type!r}, only for {', '.join(sorted(table))}. "
            f"Fix: move the model to one of these, or compile it without partitioning."
        )
    return chosen


def keep_in_python(name: str, operator: Callable[..., Any], error: Callable[..., str] | None = None) -> None:
    """Define what an ``operator.cpp``, to which calls of ``name`` go where it could be built, does not do itself.

    Args:
        name: of the operator, with its namespace.
        operator: its implementation in Python, which becomes ``<name>_in_python``.
        error: says in words what ``operator`` would raise of the same arguments, and nothing where it would not; it
            becomes ``<name>_error``. Errors that are raised in Python lose their words on their way through C++.
    """
    schema = torch.library.infer_schema(operator, mutates_args=())
    arguments = schema.rpartition("->")[0]
    torch.library.define(f"{name}_in_python", schema)
    torch.library.impl(f"{name}_in_python", "CompositeExplicitAutograd")(operator)
    if error is not None:
        torch.library.define(f"{name}_error", f"{arguments}-> str")
        torch.library.impl(f"{name}_error", "CompositeExplicitAutograd")(error)
