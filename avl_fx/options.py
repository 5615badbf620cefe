"""Backend options: what `torch.compile(..., mode=, options=)` hands to the backend, checked and typed."""

import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from avl_fx import _compat
from avl_fx._messages import near_miss, quote, show, unknown_name_remedy
from avl_fx.errors import OptionError
from avl_fx.plan import Plan

__all__ = ["BackendOptions", "parse_options"]

Compiler = Literal["inductor", "aot_eager", "eager"]


@dataclass(frozen=True)
class BackendOptions:
    """What one compilation runs with. Made by `parse_options`."""

    plan: Plan = field(default_factory=Plan.identity)
    """Which keys, queries and layers may be left out."""
    strict: bool = False
    """Raise when a pass fails, instead of compiling the untouched graph."""
    inductor: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Inductor configuration patches, by full key (``triton.cudagraphs``)."""
    compiler: Compiler = "inductor"
    """What compiles the rewritten graph."""
    mode: str | None = None
    """A mode of `torch.compile`; ``None`` is its default."""
    dump: Path | None = None
    """Folder that receives every graph before and after the passes; made on first use."""

    def inductor_config(self) -> dict[str, Any]:
        """The configuration that Inductor runs with: what `mode` stands for, overridden by the patches."""
        return {**(_compat.inductor_modes()[self.mode] if self.mode else {}), **self.inductor}


def parse_options(mode: str | None = None, options: Mapping[str, Any] | None = None) -> BackendOptions:
    """Check what Dynamo passes to a backend.

    Args:
        mode: the ``mode=`` of `torch.compile`. It speaks to Inductor alone, so other compilers ignore it.
        options: the ``options=`` of `torch.compile`:

            - ``plan``: a `Plan`, a dict, the path of a JSON file or a preset name; default: the identity.
            - ``strict``: bool; raise when a pass fails instead of compiling the untouched graph.
            - ``inductor``: dict of Inductor configuration patches.
            - ``compiler``: ``"inductor"`` (default), ``"aot_eager"`` or ``"eager"``.
            - ``mode``: the same as ``mode=``, which `torch.compile` refuses beside ``options=``.
            - ``dump``: folder for the graphs before and after the passes.

            An option that is ``None`` counts as absent.

    Raises:
        OptionError: unknown option, wrong type or value, or two options that contradict each other.
        PlanError: the plan is not valid, see `Plan.resolve`.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(
            f"must be a dict, got {show(options)}", field="options", remedy='pass for example {"plan": "plan.json"}'
        )
    values: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if name not in _PARSERS:
            raise _unknown(name, value)
        if value is not None:
            values[name] = _PARSERS[name](value)
    given = None if mode is None else _mode(mode)
    if None not in (given, values.get("mode")) and given != values["mode"]:
        raise OptionError(
            f"{values['mode']!r} contradicts mode={given!r}", field="mode", remedy="give the mode in one place"
        )
    _check_compiler(values)
    values.setdefault("mode", given)
    if values["mode"] == "default":
        values["mode"] = None
    return BackendOptions(**values)


def _unknown(name: object, value: object) -> OptionError:
    key = name.replace("-", "_") if isinstance(name, str) else ""
    if key in _compat.inductor_config_types():
        return OptionError(
            "is a setting of Inductor, not an option of this backend",
            field=str(name),
            remedy=f'nest it: options={{"inductor": {{"{key}": {reprlib.repr(value)}}}}}',
        )
    return OptionError("unknown option", field=str(name), remedy=unknown_name_remedy(name, _PARSERS, "options"))


def _check_compiler(values: Mapping[str, Any]) -> None:
    """Options that only Inductor understands must not vanish silently."""
    compiler = values.get("compiler", "inductor")
    for name in ("inductor", "mode"):
        if compiler != "inductor" and values.get(name) not in (None, {}, "default"):
            raise OptionError(
                f"has no effect with compiler {compiler!r}",
                field=name,
                remedy=f"drop it, or drop 'compiler': {compiler!r}",
            )


def _strict(value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"must be a bool, got {show(value)}", field="strict", remedy="give True or False")
    return value


def _inductor(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(
            f"must be a dict of Inductor settings, got {show(value)}",
            field="inductor",
            remedy='give for example {"max_autotune": True}',
        )
    types = _compat.inductor_config_types()
    patches: dict[str, Any] = {}
    for name, setting in value.items():
        key = name.replace("-", "_") if isinstance(name, str) else ""
        if key not in types:
            meant = near_miss(name, types)
            raise OptionError(
                "Inductor has no such setting",
                field=f"inductor.{name}",
                remedy="torch._inductor.list_options() lists them" if meant is None else f"did you mean {meant!r}?",
            )
        declared = types[key]
        # Where a float goes, an int is meant as one.
        accepted = (float, int) if declared is float else declared
        if accepted is not None and not isinstance(setting, accepted):
            assert declared is not None
            raise OptionError(
                f"must be {declared.__name__}, got {show(setting)}",
                field=f"inductor.{name}",
                remedy=f"give a value of type {declared.__name__}",
            )
        patches[key] = setting
    return patches


def _compiler(value: object) -> str:
    return _one_of(value, get_args(Compiler), "compiler")


def _mode(value: object) -> str:
    return _one_of(value, tuple(_compat.inductor_modes()), "mode")


def _one_of(value: object, known: tuple[str, ...], field: str) -> str:
    if not isinstance(value, str) or value not in known:
        meant = near_miss(value, known)
        raise OptionError(
            f"must be one of {', '.join(map(repr, known))}, got {show(value)}",
            field=field,
            remedy="give one of them" if meant is None else f"did you mean {meant!r}?",
        )
    return value


def _dump(value: object) -> Path:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise OptionError(
            f"must be the path of a folder, got {show(value)}", field="dump", remedy='give for example "out"'
        )
    folder = Path(os.path.expanduser(os.fsdecode(value)))
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{quote(folder)} is a file", field="dump", remedy="name a folder; it is made when missing")
    return folder


_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    "plan": Plan.resolve,
    "strict": _strict,
    "inductor": _inductor,
    "compiler": _compiler,
    "mode": _mode,
    "dump": _dump,
}
"""Option name -> what turns its value into a field of `BackendOptions`."""
