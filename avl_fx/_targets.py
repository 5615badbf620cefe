"""What a calibration is asked for: exactly one of four targets, and the blocks that meet it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from avl_fx._messages import show
from avl_fx._words import count
from avl_fx.blocks import Block, cheapest_blocks, largest_within, most_weight, neighbours_under
from avl_fx.errors import CalibrationError

__all__ = ["TARGETS", "Target"]

TARGETS = ("epsilon", "lazy_share", "kv_saving", "max_divergence")
"""Names of the targets, as keywords of `avl_fx.calibrate`."""

_SHARES = ("lazy_share", "kv_saving")
_ROUNDING = 1e-9
"""What a product with a share may lie above a whole number and still mean it."""


@dataclass(frozen=True)
class Target:
    """One target and its value."""

    name: str
    value: float

    @classmethod
    def of(cls, given: Mapping[str, float | None]) -> Target:
        """The one target among ``given``, which maps each of `TARGETS` to its value or ``None``.

        Raises:
            CalibrationError: none, or more than one; not a number, or out of range.
        """
        chosen = [(name, value) for name, value in given.items() if value is not None]
        if len(chosen) != 1:
            names = " and ".join(name for name, _ in chosen)
            raise CalibrationError(
                f"give one of them, not {names}" if chosen else f"one of {', '.join(TARGETS)} has to be given",
                field=chosen[1][0] if chosen else "target",
                remedy=f"drop {chosen[1][0]}" if chosen else "give for example lazy_share=0.4 (CLI: --lazy-share 0.4)",
            )
        name, value = chosen[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CalibrationError(f"must be a number, got {show(value)}", field=name, remedy="give for example 0.4")
        if name in _SHARES and not 0 < value < 1:
            raise CalibrationError(
                f"a share lies between 0 and 1, got {value:g}", field=name, remedy="give for example 0.4"
            )
        if value < 0:
            raise CalibrationError(
                f"divergences are at least 0, got {value:g}",
                field=name,
                remedy="give a number of nats above 0: two layers differ by ln 2 = 0.693 at most",
            )
        return cls(name, float(value))

    def blocks(
        self, matrix: Sequence[Sequence[float]], key_bytes: Sequence[int], kv_bytes: Sequence[int]
    ) -> tuple[Block, ...]:
        """The blocks that meet the target; empty where nothing does and the target allows that.

        Args:
            matrix: ``[L][L]`` divergences, infinite where two layers may not share a block.
            key_bytes, kv_bytes: what each layer stores of a token, keys alone and in all; 0 for layers that were not
                observed.

        Raises:
            CalibrationError: no choice of blocks makes so many layers lazy, or saves so many bytes.
        """
        if self.name == "epsilon":
            return neighbours_under(matrix, self.value)
        if self.name == "max_divergence":
            return largest_within(matrix, self.value)
        if self.name == "lazy_share":
            weights, whole = [1] * len(matrix), float(len(matrix))
        else:
            # In units that all layers have in common, so that the table of the dynamic programme stays small.
            unit = reduce(math.gcd, key_bytes, 0) or 1
            weights, whole = [n // unit for n in key_bytes], sum(kv_bytes) / unit
        found = cheapest_blocks(matrix, weights, math.ceil(self.value * whole - _ROUNDING))
        if found is None:
            most = most_weight(matrix, weights)
            able = f"at most {most} of {count(len(matrix), 'layer')}" if self.name == "lazy_share" else "at most"
            raise CalibrationError(
                f"{self.value:g} cannot be reached: {able} ({most / whole:.3f}) "
                + ("can be lazy" if self.name == "lazy_share" else "of the KV bytes can be saved"),
                field=self.name,
                remedy=f"give {math.floor(1000 * most / whole) / 1000:g} or less"
                if most
                else "use another model: no two neighbouring layers of this one may share a block",
            )
        return found

    def __str__(self) -> str:
        return f"{self.name} {self.value:g}"
