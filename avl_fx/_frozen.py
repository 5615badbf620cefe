"""The base of the plan's models: frozen, strict, and raising `PlanError` where pydantic would raise its own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from avl_fx._messages import show, unknown_name_remedy
from avl_fx.errors import PlanError

__all__ = ["FrozenModel", "section"]


class FrozenModel(BaseModel):
    """A model that is immutable, strict about types and keys, and raises `PlanError` alone.

    Field descriptions are noun phrases that name the legal values: they double as the remedy ("give <description>").
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    if not TYPE_CHECKING:  # type checkers keep the signature that pydantic gives

        def __init__(self, /, **data: Any) -> None:
            # Nested models are built through their own `__init__` too, so each one reports its own fields; `section`
            # puts the path together.
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise _plan_error(error, type(self)) from None

        def __setattr__(self, name: str, value: Any) -> None:
            raise PlanError("plans are immutable", field=name, remedy="build a new plan, for example with Plan.combine")

        def __delattr__(self, name: str) -> None:
            self.__setattr__(name, None)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from plain data, as parsed from JSON.

        Raises:
            PlanError: for anything that is not a valid description; names the first field at fault.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"must be an object, got {show(data)}", remedy=f"give an object with {_key_list(cls)}")
        for key in data:
            if not isinstance(key, str):
                raise PlanError(f"keys must be text, got {show(key)}", remedy=f"use {_key_list(cls)}")
        return cls(**data)

    def departures(self, *names: str) -> str:
        """``, scoring_window 8, spread 0.5``: those of these fields that do not have their default."""
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in names if getattr(self, name) != fields[name].default}
        return "".join(
            f", {name} {value:g}" if isinstance(value, float) else f", {name} {value}" for name, value in values.items()
        )

    @property
    def is_identity(self) -> bool:
        """True when the outputs equal those of the untouched model for every input."""
        raise NotImplementedError


def section(name: str, model: type[FrozenModel]) -> BeforeValidator:
    """Build a section from plain data, and report its mistakes under its name in the plan."""

    def build(value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        try:
            return model.from_dict(value)
        except PlanError as error:
            field = name if error.field is None else f"{name}.{error.field}"
            raise PlanError(error.message, field=field, remedy=error.remedy) from None

    return BeforeValidator(build)


def _plan_error(error: ValidationError, model: type[BaseModel]) -> PlanError:
    """The first problem that pydantic found, in our words; the others by path."""
    # Unknown keys first: a misspelt key is also reported as missing, which helps nobody.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    problem, paths = problems[0], [_path(problem["loc"]) for problem in problems]
    name = str(problem["loc"][0])
    remedy = f"give {_descriptions(model).get(name)}"
    if problem["type"] == "extra_forbidden" and name in model.model_fields:
        message, remedy = "the same setting is given twice", "keep one of them"
    elif problem["type"] == "extra_forbidden":
        message, remedy = "unknown key", unknown_name_remedy(name, _keys(model))
    elif problem["type"] == "missing":
        message = "is missing"
    else:
        wording = problem["msg"].replace("Input should", "must").replace("a valid tuple", "a list")
        message = f"{wording}, got {show(problem['input'])}"
    if len(problems) > 1:
        message += f" ({len(problems) - 1} more: {', '.join(paths[1:])})"
    return PlanError(message, field=paths[0], remedy=remedy)


def _keys(model: type[BaseModel]) -> list[str]:
    """The keys as written in JSON."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _descriptions(model: type[BaseModel]) -> dict[str, str | None]:
    """What a field takes, by either of its names."""
    fields = model.model_fields.items()
    return {key: field.description for name, field in fields for key in (name, field.alias or name)}


def _key_list(model: type[BaseModel]) -> str:
    return f"the keys {', '.join(_keys(model))}"


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path
