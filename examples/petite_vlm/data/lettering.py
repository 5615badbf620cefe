"""Type on a picture: as large as fits, and where each letter of it is."""

from __future__ import annotations

from pathlib import Path

from PIL import ImageFont

from .fonts import font
from .regions import Box, Region, point


def fitting(face: Path, size: int, text: str, width: float, step: int) -> ImageFont.FreeTypeFont:
    """The font at ``size`` pixels, or by as many steps smaller as ``text`` needs to be at most ``width`` wide."""
    while font(face, size).getlength(text) > width:
        size -= step
    return font(face, size)


def ink_box(letters: ImageFont.FreeTypeFont, text: str, x: float, y: float) -> Box:
    """What ``text`` covers when it is drawn at (x, y)."""
    left, top, right, bottom = letters.getbbox(text)
    return x + left, y + top, x + right, y + bottom


def spelling(letters: ImageFont.FreeTypeFont, text: str, x: float, y: float) -> tuple[Region, ...]:
    """A point for each letter and digit of a line drawn at (x, y), in lower case, all at the height of its middle."""
    _, top, _, bottom = ink_box(letters, text, x, y)
    found = []
    for place, sign in enumerate(text.lower()):
        start, end = letters.getlength(text[:place]), letters.getlength(text[: place + 1])
        middle = point((x + start, top, x + end, bottom))
        found.append(Region(middle, {"digit" if sign.isdigit() else "letter": sign}))
    return tuple(found)


def word_regions(letters: ImageFont.FreeTypeFont, text: str, ink: str, x: float, y: float) -> tuple[Region, ...]:
    """A coloured word drawn at (x, y): the whole of it, and its letters."""
    return Region(ink_box(letters, text, x, y), {"kind": "word", "colour": ink}), *spelling(letters, text, x, y)
