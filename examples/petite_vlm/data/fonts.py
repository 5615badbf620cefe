"""Fonts by split: what is read in tests is set in types that no training picture used."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

import matplotlib
from PIL import ImageFont

from examples.petite_vlm.parts import FREEFONT, LIBERATION

from .archives import unpacked
from .questions import Split


@cache
def fonts(split: Split) -> tuple[Path, ...]:
    """Font files. Train: DejaVu (out of matplotlib) and Liberation; test: GNU FreeFont."""
    if split == "test":
        folder = unpacked(FREEFONT, lambda name: name.endswith(".ttf"))
        return tuple(sorted(p for p in folder.glob("Free*.ttf") if "Oblique" not in p.name and "Italic" not in p.name))
    dejavu = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    liberation = unpacked(LIBERATION, lambda name: name.endswith(".ttf"))
    found = [*dejavu.glob("DejaVu*.ttf"), *liberation.glob("*.ttf")]
    unfit = ("Oblique", "Italic", "Display")
    return tuple(sorted((p for p in found if not any(word in p.name for word in unfit)), key=lambda p: p.name))


@lru_cache(maxsize=512)
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font at ``size`` pixels."""
    return ImageFont.truetype(str(path), size)
