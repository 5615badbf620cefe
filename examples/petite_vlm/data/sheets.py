"""Sheets full of type: what letters look like, some fifty of them a picture.

Nothing is asked of them: they only teach a projector, patch by patch (`align`).
"""

from __future__ import annotations

from PIL import Image, ImageDraw

from .canvas import COLOURS, SIZE, ground
from .fonts import font, fonts
from .lettering import word_regions
from .questions import Split, seeded
from .regions import Region
from .words import INKS, words

SMALLEST, LARGEST = 22, 96
"""Pixels of the type, small ones more often: from what receipts are set in to larger than `words`."""
NUMBERS = 0.25
"""Share of numbers among the words."""


class Sheets:
    """Lines of words and numbers, each line in a font, a size and an ink of its own."""

    name = "sheets"

    def _made(self, split: Split, image: int) -> tuple[Image.Image, tuple[Region, ...]]:
        draw = seeded(self.name, split, image)
        canvas = ground(draw)
        pen = ImageDraw.Draw(canvas)
        regions: list[Region] = []
        y = draw.randint(0, 8)
        while True:
            size = SMALLEST * (LARGEST / SMALLEST) ** draw.random()
            letters = font(draw.choice(fonts(split)), round(size))
            height = sum(letters.getmetrics())
            if y + height > SIZE:
                return canvas, tuple(regions)
            ink, x = draw.choice(INKS), float(draw.randint(2, 16))
            while True:
                word = draw.choice(words(split))
                said = str(draw.randint(1, 99)) if draw.random() < NUMBERS else word
                shown = draw.choice((str.upper, str.lower, str.capitalize))(said)
                if x + letters.getlength(shown) > SIZE - 2:
                    break
                pen.text((x, y), shown, font=letters, fill=COLOURS[ink])
                regions += word_regions(letters, shown, ink, x, y)
                x += letters.getlength(shown) + letters.getlength(" ") + draw.randint(0, 12)
            y += height + draw.randint(-4, 4)

    def picture(self, split: Split, image: int) -> Image.Image:
        return self._made(split, image)[0]

    def regions(self, split: Split, image: int) -> tuple[Region, ...]:
        return self._made(split, image)[1]
