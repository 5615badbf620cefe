"""Two or three things in four quarters: between close-ups, where there is nothing to search for, and `composites`.

At 112 pixels a thing is as large as on a canvas of nine cells at 224, on a quarter of the image tokens.
"""

from __future__ import annotations

import random
from typing import get_args

from PIL import Image, ImageDraw

from .canvas import COLOURS, PLACES, SHAPES, SIZE, ground, shape, sized
from .cutouts import NAMED, Kind, digit, digits, emoji
from .fonts import font, fonts
from .questions import Question, Split, Task, seeded
from .words import INKS, spelt, words

KINDS = (*get_args(Kind), "word", "digit", "shape")
FEWEST, MOST = 2, 3
CELL = SIZE // 2
CORNERS = (0, 2, 6, 8)
"""Places of the quarters among the nine that have names."""
SMALLEST, LARGEST = 84, 156
SMALLEST_TYPE, LARGEST_TYPE = 60, 120
LONGEST = 4
"""Letters that fit into a quarter."""


class Few:
    """What, which, where and which colour, of few things; for training only."""

    name = "few"
    task: Task = "vqa"
    max_new_tokens = 8

    def images(self, split: Split) -> int:
        return 1000 if split == "test" else 1_000_000

    def _made(self, split: Split, image: int) -> tuple[Image.Image, list[tuple[str, str, str]]]:
        """The picture, and question, answer and what is asked for."""
        draw = seeded(self.name, split, image)
        canvas = ground(draw)
        asked: list[tuple[str, str, str]] = []
        kinds = draw.sample(KINDS, draw.randint(FEWEST, MOST))
        for kind, quarter in zip(kinds, draw.sample(range(4), len(kinds)), strict=True):
            where = PLACES[CORNERS[quarter]]
            named = kind
            if kind == "word":
                word, ink = draw.choice(words(split))[: draw.randint(1, LONGEST)], draw.choice(INKS)
                thing = _written(draw.choice((str.upper, str.lower))(word), ink, draw, split)
                asked.append((f"spell the {ink} word.", spelt(word), "word"))
            elif kind == "shape":
                form, colour = draw.choice(SHAPES), draw.choice(tuple(COLOURS))
                thing, named = shape(form, colour, draw.randint(SMALLEST, LARGEST), draw.uniform(-12, 12)), form
                asked.append((f"which colour is the {form}?", colour, "colour"))
            elif kind == "digit":
                thing, said = digit(split, draw.randrange(digits(split)))
                thing = sized(thing, draw.randint(SMALLEST, LARGEST))
                asked.append(("which digit is there?", said, "digit"))
            else:
                short = draw.choice(tuple(NAMED[kind]))  # type: ignore[index]
                thing, named = sized(emoji(short), draw.randint(SMALLEST, LARGEST)), NAMED[kind][short]  # type: ignore[index]
                asked.append((f"which {kind} is there?", named, "what"))
            asked.append((f"where is the {named}?", where, "where"))
            row, column = divmod(quarter, 2)
            x = column * CELL + draw.randint(0, max(0, CELL - thing.width))
            y = row * CELL + draw.randint(0, max(0, CELL - thing.height))
            canvas.paste(thing, (x, y), thing)
        return canvas, asked

    def picture(self, split: Split, image: int) -> Image.Image:
        return self._made(split, image)[0]

    def questions(self, split: Split, image: int) -> list[Question]:
        return [Question(image, *question) for question in self._made(split, image)[1]]


def _written(word: str, ink: str, draw: random.Random, split: Split) -> Image.Image:
    """RGBA, as large as the letters."""
    face, size = draw.choice(fonts(split)), draw.randint(SMALLEST_TYPE, LARGEST_TYPE)
    while font(face, size).getlength(word) > CELL - 8:
        size -= 4
    left, top, right, bottom = (round(edge) for edge in font(face, size).getbbox(word))
    picture = Image.new("RGBA", (max(1, right - left), max(1, bottom - top)), (0, 0, 0, 0))
    ImageDraw.Draw(picture).text((-left, -top), word, font=font(face, size), fill=(*COLOURS[ink], 255))
    return picture
