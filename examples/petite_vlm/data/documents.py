"""Receipts, tables and bar charts in small type: a figure has to be found by its label, then read."""

from __future__ import annotations

import random
from functools import lru_cache

from PIL import Image, ImageDraw

from .canvas import COLOURS, SIZE
from .cutouts import NAMED
from .fonts import font, fonts
from .questions import Question, Split, Task, seeded

GOODS = tuple(sorted({name for name in NAMED["food"].values() if len(name) <= 8}))
FORMS = ("receipt", "table", "chart")
_MARGIN = 20


@lru_cache(maxsize=256)
def _document(name: str, split: Split, image: int) -> tuple[Image.Image, tuple[tuple[str, str, str], ...]]:
    """A page; and questions, answers and kinds."""
    draw = seeded(name, split, image)
    page = Image.new("RGB", (SIZE, SIZE), tuple(draw.randint(238, 255) for _ in range(3)))
    pen = ImageDraw.Draw(page)
    face = draw.choice(fonts(split))
    form = draw.choice(FORMS)
    makers = {"receipt": _receipt, "table": _table, "chart": _chart}
    asked = makers[form](pen, face, draw)
    return page, tuple((question, answer, form) for question, answer in asked)


def _receipt(pen: ImageDraw.ImageDraw, face, draw: random.Random) -> list[tuple[str, str]]:
    goods = draw.sample(GOODS, draw.randint(3, 5))
    prices = [draw.randint(1, 19) for _ in goods]
    step = (SIZE - 2 * _MARGIN) // (len(goods) + 1)
    letters = font(face, min(40, int(0.62 * step)))
    y = _MARGIN
    for label, price in [*zip(goods, prices, strict=True), ("total", sum(prices))]:
        if label == "total":
            pen.line((_MARGIN, y - 2, SIZE - _MARGIN, y - 2), fill=(0, 0, 0), width=2)
        pen.text((_MARGIN, y), label, font=letters, fill=(10, 10, 10))
        pen.text((SIZE - _MARGIN - letters.getlength(str(price)), y), str(price), font=letters, fill=(10, 10, 10))
        y += step
    lines = [*zip(goods, prices, strict=True), ("total", sum(prices))]
    return [(f"how much is the {label}?", str(price)) for label, price in lines]


def _table(pen: ImageDraw.ImageDraw, face, draw: random.Random) -> list[tuple[str, str]]:
    columns = draw.sample(("mon", "tue", "wed", "thu", "fri"), 2)
    rows = draw.sample(GOODS, 3)
    letters = font(face, 36)
    x, y = (_MARGIN, 190, 266), 30
    cells = {(row, column): draw.randint(1, 19) for row in rows for column in columns}
    for column, left in zip(columns, x[1:], strict=True):
        pen.text((left - 6, y), column, font=font(face, 30), fill=(10, 10, 10))
    for number, row in enumerate(rows, start=1):
        top = y + 72 * number
        pen.line((_MARGIN, top - 14, SIZE - _MARGIN, top - 14), fill=(120, 120, 120), width=2)
        pen.text((x[0], top), row, font=font(face, 32), fill=(10, 10, 10))
        for column, left in zip(columns, x[1:], strict=True):
            pen.text((left, top), str(cells[row, column]), font=letters, fill=(10, 10, 10))
    return [(f"how many {row} on {column}?", str(count)) for (row, column), count in cells.items()]


def _chart(pen: ImageDraw.ImageDraw, face, draw: random.Random) -> list[tuple[str, str]]:
    bars = draw.sample(GOODS, 3)
    values = draw.sample(range(2, 20), 3)
    colours = draw.sample([colour for colour in COLOURS if colour != "yellow"], 3)
    width = (SIZE - 2 * _MARGIN) // 3
    floor, top = SIZE - 50, 60
    for number, (bar, value, colour) in enumerate(zip(bars, values, colours, strict=True)):
        left = _MARGIN + number * width
        height = (floor - top) * value / 20
        pen.rectangle((left + 14, floor - height, left + width - 14, floor), fill=COLOURS[colour])
        label, figure = font(face, 24), font(face, 34)
        while label.getlength(bar) > width - 4:
            label = font(face, label.size - 1)  # type: ignore[arg-type]
        pen.text((left + (width - label.getlength(bar)) / 2, floor + 8), bar, font=label, fill=(10, 10, 10))
        at = left + (width - figure.getlength(str(value))) / 2
        pen.text((at, floor - height - 44), str(value), font=figure, fill=(10, 10, 10))
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
        return _document(self.name, split, image)[0]

    def questions(self, split: Split, image: int) -> list[Question]:
        return [Question(image, *asked) for asked in _document(self.name, split, image)[1]]
