"""Fonts by split: what is read in tests is set in types that no training picture used."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

import matplotlib
from PIL import ImageFont

from examples.petite_vlm.parts import (
    ANONYMOUS_PRO,
    CALADEA,
    CARLITO,
    COURIER_PRIME,
    FREEFONT,
    GO,
    INCONSOLATA,
    LATO,
    LIBERATION,
    LIBERTINE,
    OPEN_SANS,
    Part,
)

from .archives import unpacked
from .questions import Split

TRAINED: dict[Part, tuple[str, ...]] = {
    LIBERATION: tuple(
        f"Liberation{family}-{weight}.ttf" for family in ("Mono", "Sans", "Serif") for weight in ("Bold", "Regular")
    ),
    LATO: ("Lato-Black.ttf", "Lato-Light.ttf", "Lato-Regular.ttf"),
    OPEN_SANS: ("OpenSans-CondBold.ttf", "OpenSans-ExtraBold.ttf", "OpenSans-Light.ttf", "OpenSans-Regular.ttf"),
    GO: ("Go-Bold.ttf", "Go-Mono-Bold.ttf", "Go-Mono.ttf", "Go-Regular.ttf"),
    CARLITO: ("Carlito-Bold.ttf", "Carlito-Regular.ttf"),
    CALADEA: ("Caladea-Bold.ttf", "Caladea-Regular.ttf"),
    LIBERTINE: ("LinBiolinum_R.otf", "LinLibertine_M.otf", "LinLibertine_R.otf", "LinLibertine_RB.otf"),
    INCONSOLATA: ("Inconsolata.otf",),
    COURIER_PRIME: ("Courier Prime.otf", "Courier Prime Bold.otf"),
    ANONYMOUS_PRO: ("Anonymous Pro.ttf", "Anonymous Pro B.ttf"),
}
"""Upright faces by package, besides matplotlib's DejaVu. None is a drawing of those that GNU FreeFont is made of."""


@cache
def fonts(split: Split) -> tuple[Path, ...]:
    """Font files, by name. Train: DejaVu (out of matplotlib) and those of `TRAINED`; test: GNU FreeFont."""
    if split == "test":
        folder = unpacked(FREEFONT, lambda name: name.endswith(".ttf"))
        return tuple(sorted(p for p in folder.glob("Free*.ttf") if "Oblique" not in p.name and "Italic" not in p.name))
    unfit = ("Oblique", "Italic", "Display")
    dejavu = (Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf")
    found = [path for path in dejavu if not any(word in path.name for word in unfit)]
    for part, names in TRAINED.items():
        folder = unpacked(part, lambda name: name.endswith((".ttf", ".otf")))
        found += [folder / name for name in names]
    return tuple(sorted(found, key=lambda p: p.name))


@lru_cache(maxsize=512)
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font at ``size`` pixels."""
    return ImageFont.truetype(str(path), size)
