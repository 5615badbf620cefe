"""Receipts, tables and bar charts in small type: a figure has to be found by its label, then read."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .canvas import COLOURS, SIZE
from .cutouts import NAMED
from .fonts import font, fonts
from .lettering import fitting, ink_box, spelling
from .questions import Question, Split, Task, seeded
from .regions import DAYS, TOTAL, Region

GOODS = tuple(sorted({name for name in NAMED["food"].values() if len(name) <= 8}))
FORMS = ("receipt", "table", "chart")
BLACK = (10, 10, 10)
_MARGIN = 20


@dataclass
class Page:
    """What is drawn on, and where things came to be."""

    picture: Image.Image
    face: Path
    regions: list[Region] = field(default_factory=list)

    @property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.picture)

    def label(self, x: float, y: float, word: str, letters: ImageFont.FreeTypeFont) -> None:
        """A word that questions go by: known as a whole."""
        self.pen.text((x, y), word, font=letters, fill=BLACK)
        self.regions.append(Region(ink_box(letters, word, x, y), {"kind": "word", "name": word}))

    def figure(self, x: float, y: float, number: int, letters: ImageFont.FreeTypeFont) -> None:
        """A number that answers: known by its digits."""
        self.pen.text((x, y), str(number), font=letters, fill=BLACK)
        self.regions += spelling(letters, str(number), x, y)


Asked = list[tuple[str, str]]


@lru_cache(maxsize=256)
def _document(name: str, split: Split, image: int) -> tuple[Page, tuple[tuple[str, str, str], ...]]:
    """A page; and questions, answers and kinds."""
    draw = seeded(name, split, image)
    picture = Image.new("RGB", (SIZE, SIZE), tuple(draw.randint(238, 255) for _ in range(3)))
    page = Page(picture, draw.choice(fonts(split)))
    form = draw.choice(FORMS)
    makers = {"receipt": _receipt, "table": _table, "chart": _chart}
    asked = makers[form](page, draw)
    return page, tuple((question, answer, form) for question, answer in asked)


def _receipt(page: Page, draw: random.Random) -> Asked:
    goods = draw.sample(GOODS, draw.randint(3, 5))
    prices = [draw.randint(1, 19) for _ in goods]
    step = (SIZE - 2 * _MARGIN) // (len(goods) + 1)
    letters = font(page.face, min(40, int(0.62 * step)))
    y = _MARGIN
    for label, price in [*zip(goods, prices, strict=True), (TOTAL, sum(prices))]:
        if label == TOTAL:
            page.pen.line((_MARGIN, y - 2, SIZE - _MARGIN, y - 2), fill=(0, 0, 0), width=2)
        page.label(_MARGIN, y, label, letters)
        page.figure(SIZE - _MARGIN - letters.getlength(str(price)), y, price, letters)
        y += step
    lines = [*zip(goods, prices, strict=True), (TOTAL, sum(prices))]
    return [(f"how much is the {label}?", str(price)) for label, price in lines]


def _table(page: Page, draw: random.Random) -> Asked:
    columns = draw.sample(DAYS, 2)
    rows = draw.sample(GOODS, 3)
    letters = font(page.face, 36)
    x, y = (_MARGIN, 190, 266), 30
    cells = {(row, column): draw.randint(1, 19) for row in rows for column in columns}
    for column, left in zip(columns, x[1:], strict=True):
        page.label(left - 6, y, column, font(page.face, 30))
    for number, row in enumerate(rows, start=1):
        top = y + 72 * number
        page.pen.line((_MARGIN, top - 14, SIZE - _MARGIN, top - 14), fill=(120, 120, 120), width=2)
        page.label(x[0], top, row, font(page.face, 32))
        for column, left in zip(columns, x[1:], strict=True):
            page.figure(left, top, cells[row, column], letters)
    return [(f"how many {row} on {column}?", str(count)) for (row, column), count in cells.items()]


def _chart(page: Page, draw: random.Random) -> Asked:
    bars = draw.sample(GOODS, 3)
    values = draw.sample(range(2, 20), 3)
    colours = draw.sample([colour for colour in COLOURS if colour != "yellow"], 3)
    width = (SIZE - 2 * _MARGIN) // 3
    floor, top = SIZE - 50, 60
    for number, (bar, value, colour) in enumerate(zip(bars, values, colours, strict=True)):
        left = _MARGIN + number * width
        height = (floor - top) * value / 20
        box = (left + 14, floor - height, left + width - 14, floor)
        page.pen.rectangle(box, fill=COLOURS[colour])
        page.regions.append(Region(box, {"colour": colour, "name": bar}))
        figure, label = font(page.face, 34), fitting(page.face, 24, bar, width - 4, step=1)
        page.label(left + (width - label.getlength(bar)) / 2, floor + 8, bar, label)
        page.figure(left + (width - figure.getlength(str(value))) / 2, floor - height - 44, value, figure)
    asked = [(f"what is the value of {bar}?", str(value)) for bar, value in zip(bars, values, strict=True)]
    highest = max(range(3), key=values.__getitem__)
    asked.append(("which bar is the highest?", bars[highest]))
    return asked + [(f"which colour is the bar of {bar}?", colour) for bar, colour in zip(bars, colours, strict=True)]


class Documents:
    """Receipts, tables and bar charts, asked for their figures."""

    name = "documents"
    task: Task = "ocr"
    max_new_tokens = 6

    def images(self, split: Split) -> int:
        return 1000 if split == "test" else 1_000_000

    def picture(self, split: Split, image: int) -> Image.Image:
        return _document(self.name, split, image)[0].picture

    def regions(self, split: Split, image: int) -> tuple[Region, ...]:
        return tuple(_document(self.name, split, image)[0].regions)

    def questions(self, split: Split, image: int) -> list[Question]:
        return [Question(image, *asked) for asked in _document(self.name, split, image)[1]]
