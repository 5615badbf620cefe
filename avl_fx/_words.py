"""Numbers, ranges and sizes as people read them, in ASCII."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "WHOLE",
    "ascii_only",
    "count",
    "either",
    "flops",
    "flops_change",
    "kib",
    "percent",
    "ranges",
    "seconds",
    "symbols",
]

WHOLE = "avl_fx.compile(model, plan=...)"
"""The front door that captures the decoder as one piece, as advice writes it."""


def count(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``, ``2 batches``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"


def flops(number: float) -> str:
    """FLOPs with a decimal prefix: ``11.3 MFLOP``."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g} {prefix}FLOP"
        number /= 1000
    return f"{number:.3g} PFLOP"


def flops_change(before: float, after: float) -> str:
    """``34.4 -> 31.2 MFLOP``: the unit once where it is the same."""
    left, unit = flops(before).split()
    return f"{left} -> {flops(after)}" if flops(after).endswith(f" {unit}") else f"{left} {unit} -> {flops(after)}"


def kib(number: float) -> str:
    """Bytes with a binary prefix: ``67.0 KiB``."""
    if number < 1024:
        return f"{number:.0f} B"
    for prefix in ("Ki", "Mi", "Gi"):
        number /= 1024
        if number < 1024:
            return f"{number:.1f} {prefix}B"
    return f"{number / 1024:.1f} TiB"


def seconds(value: float) -> str:
    """``1.5 s``, or ``20 ms`` below a second."""
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def percent(part: float, whole: float) -> str:
    """``25%``; ``0%`` of nothing."""
    return f"{100 * part / whole:.0f}%" if whole else "0%"


def either(values: Iterable[int]) -> str:
    """``4 or 8``; ``unknown`` for none."""
    return " or ".join(map(str, values)) or "unknown"


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def symbols(size: int | str) -> str:
    """A symbolic size with letters: Dynamo's own numbers differ from layer to layer and mean nothing to people."""
    names: dict[str, str] = {}
    return re.sub(r"\b[su]\d+", lambda m: names.setdefault(m[0], "nmlk"[min(len(names), 3)]), str(size))


def ascii_only(text: str) -> str:
    """``text`` with a question mark for every character that some terminals cannot show."""
    return text.encode("ascii", "replace").decode()
