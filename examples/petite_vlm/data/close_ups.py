"""One thing fills the picture: what a model learns first, on few image tokens.

At 84 pixels a thing is as large as on a canvas of several at 224, and there is nothing to search for.
"""

from __future__ import annotations

from typing import get_args

from PIL import Image, ImageDraw

from .canvas import COLOURS, SHAPES, SIZE, ground, shape, sized
from .cutouts import NAMED, Kind, digit, digits, emoji
from .fonts import font, fonts
from .questions import Question, Split, Task, seeded
from .words import INKS, spelt, words

KINDS = ("word", "thing", "digit", "shape")
SHARES = (4, 4, 1, 1)
SMALLEST, LARGEST = 0.5, 0.9
"""Of the picture's side."""
SMALLEST_TYPE, LARGEST_TYPE = 96, 280
"""Pixels of the type, as far as the picture is wide enough."""
LONGEST = 6
"""Letters; from one on, for whoever cannot tell letters learns nothing from words."""


class CloseUps:
    """An emoji, a digit, a shape or a word, for training only."""

    name = "close_ups"
    task: Task = "vqa"
    max_new_tokens = 8

    def images(self, split: Split) -> int:
        return 1000 if split == "test" else 1_000_000

    def _made(self, split: Split, image: int) -> tuple[Image.Image, list[tuple[str, str, str]]]:
        """The picture, and question, answer and what is asked for."""
        draw = seeded(self.name, split, image)
        canvas = ground(draw)
        kind = draw.choices(KINDS, SHARES)[0]
        side = round(SIZE * draw.uniform(SMALLEST, LARGEST))
        asked: list[tuple[str, str, str]]
        if kind == "word":
            word, ink = draw.choice(words(split))[: draw.randint(1, LONGEST)], draw.choice(INKS)
            shown = draw.choice((str.upper, str.lower, str.capitalize))(word)
            face, size = draw.choice(fonts(split)), draw.randint(SMALLEST_TYPE, LARGEST_TYPE)
            while font(face, size).getlength(shown) > SIZE - 16:
                size -= 4
            left, top, right, bottom = font(face, size).getbbox(shown)
            x = draw.randint(4, max(4, int(SIZE - 4 - (right - left))))
            y = draw.randint(4, max(4, int(SIZE - 4 - (bottom - top))))
            ImageDraw.Draw(canvas).text((x - left, y - top), shown, font=font(face, size), fill=COLOURS[ink])
            return canvas, [(f"spell the {ink} word.", spelt(word), "word"), ("spell the word.", spelt(word), "word")]
        if kind == "shape":
            form, colour = draw.choice(SHAPES), draw.choice(tuple(COLOURS))
            thing = shape(form, colour, side, draw.uniform(-12, 12))
            asked = [(f"which colour is the {form}?", colour, "colour"), ("what is there?", f"{colour} {form}", "what")]
        elif kind == "digit":
            thing, said = digit(split, draw.randrange(digits(split)))
            asked = [("which digit is there?", said, "digit"), ("what is there?", f"digit {said}", "what")]
        else:
            group = draw.choice(get_args(Kind))
            short = draw.choice(tuple(NAMED[group]))
            thing, named = emoji(short), NAMED[group][short]
            asked = [(f"which {group} is there?", named, "what"), ("what is there?", named, "what")]
        thing = sized(thing, side)
        canvas.paste(thing, (draw.randint(0, SIZE - thing.width), draw.randint(0, SIZE - thing.height)), thing)
        return canvas, asked

    def picture(self, split: Split, image: int) -> Image.Image:
        return self._made(split, image)[0]

    def questions(self, split: Split, image: int) -> list[Question]:
        return [Question(image, *question) for question in self._made(split, image)[1]]
