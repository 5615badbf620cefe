"""What a model is given, checked before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Number
from typing import Any

from torch import Tensor, nn

from avl_fx.errors import CaptureError

__all__ = ["check_inputs"]


def check_inputs(model: nn.Module, inputs: Mapping[str, Any], example: str) -> None:
    """Inputs that cannot be a model's fail here, with a remedy, rather than deep inside the model.

    Raises:
        CaptureError: none holds a tensor, or something else stands where a tensor belongs. ``example`` shows how to
            pass them.
    """
    takes = inspect.signature(model.forward).parameters
    for name, value in inputs.items():
        numbers = name in takes and _holds_numbers(value)
        if numbers or (hasattr(value, "__array__") and not isinstance(value, Tensor)):
            raise CaptureError(
                f"must be a tensor, got {type(value).__name__}",
                field=name,
                remedy="pass return_tensors='pt' to the processor, or wrap it in torch.as_tensor(...)",
            )
    if not any(_holds_tensor(value) for value in inputs.values()):
        raise CaptureError(
            "no tensor among them" if inputs else "none were given",
            field="inputs",
            remedy=f"pass what the model takes, for example {example}",
        )


def _holds_numbers(value: object) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
        if isinstance(value, Number):
            return True
    return False


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)
