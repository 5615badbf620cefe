"""Where things are on a canvas: what a projector can be told patch by patch, before any language model looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image

from .canvas import COLOURS, SHAPES
from .cutouts import NAMED
from .questions import Split

Group = Literal["name", "kind", "colour", "letter", "digit"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of a canvas."""

DAYS = ("mon", "tue", "wed", "thu", "fri")
TOTAL = "total"

VOCABULARY: dict[Group, tuple[str, ...]] = {
    "name": (*dict.fromkeys(name for names in NAMED.values() for name in names.values()), *SHAPES, *DAYS, TOTAL),
    "kind": (*NAMED, "digit", "shape", "word"),
    "colour": tuple(COLOURS),
    "letter": tuple("abcdefghijklmnopqrstuvwxyz"),
    "digit": tuple("0123456789"),
}
"""By group, all that a region may be said to be. Of one group a place is one thing at most."""


@dataclass(frozen=True)
class Region:
    """Part of a canvas, and what is there; a box without extent speaks of the one patch that it lies in."""

    box: Box
    says: Mapping[Group, str]


class Located(Protocol):
    """A data set that knows where its things are."""

    name: str

    def picture(self, split: Split, image: int) -> Image.Image:
        """The picture, RGB."""
        ...

    def regions(self, split: Split, image: int) -> tuple[Region, ...]:
        """The regions of a picture; pixels of a canvas of `canvas.SIZE`, whatever size a model looks at."""
        ...


def point(box: Box) -> Box:
    """The middle of a box."""
    across, down = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return across, down, across, down
