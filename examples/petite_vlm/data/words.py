"""Rendered words, to be spelt: no test word and no test font was seen in training."""

from __future__ import annotations

import re
from functools import cache

from PIL import Image, ImageDraw
from transformers import AutoTokenizer

from examples.petite_vlm.convert import language_dir

from .canvas import COLOURS, SIZE, ground
from .fonts import fonts
from .lettering import fitting, word_regions
from .questions import Question, Split, Task, seeded
from .regions import Region

SMALLEST, LARGEST = 36, 72
"""Pixels of the type on a canvas of 336: a letter of the smallest covers about one patch of 14 at 224 pixels."""
INKS = ("red", "green", "blue", "purple", "black", "brown")
COUNT = 3
"""Words on a canvas, one below the other, each in an ink of its own."""


@cache
def words(split: Split) -> tuple[str, ...]:
    """English words and beginnings of words, three to six letters: tokens of the language model. A tenth is tested."""
    vocabulary = AutoTokenizer.from_pretrained(language_dir()).get_vocab()
    found = sorted({token[1:] for token in vocabulary if re.fullmatch(r"Ġ[a-z]{3,6}", token)})
    return tuple(word for place, word in enumerate(found) if (place % 10 == 0) == (split == "test"))


def spelt(word: str) -> str:
    """How a word is answered: letter by letter, so that an unseen word asks for nothing but reading."""
    return " ".join(word)


class Words:
    """Three words on a canvas, small to large, in capitals, lower case or both; asked for by their ink."""

    name = "words"
    task: Task = "ocr"
    max_new_tokens = 8

    def images(self, split: Split) -> int:
        return 1000 if split == "test" else 1_000_000

    def _written(self, split: Split, image: int) -> list[tuple[str, str]]:
        """Words and their inks, from top to bottom."""
        draw = seeded(f"{self.name} written", split, image)
        return list(zip(draw.sample(words(split), COUNT), draw.sample(INKS, COUNT), strict=True))

    def picture(self, split: Split, image: int) -> Image.Image:
        return self._made(split, image)[0]

    def regions(self, split: Split, image: int) -> tuple[Region, ...]:
        return self._made(split, image)[1]

    def _made(self, split: Split, image: int) -> tuple[Image.Image, tuple[Region, ...]]:
        draw = seeded(self.name, split, image)
        canvas = ground(draw)
        pen = ImageDraw.Draw(canvas)
        band = SIZE // COUNT
        regions: list[Region] = []
        for number, (word, ink) in enumerate(self._written(split, image)):
            word = draw.choice((str.upper, str.lower, str.capitalize))(word)
            face, size = draw.choice(fonts(split)), draw.randint(SMALLEST, LARGEST)
            letters = fitting(face, size, word, SIZE - 16, step=2)
            left, top, right, bottom = letters.getbbox(word)
            x = draw.randint(4, max(4, int(SIZE - 4 - (right - left))))
            y = number * band + draw.randint(2, max(2, int(band - 2 - (bottom - top))))
            pen.text((x - left, y - top), word, font=letters, fill=COLOURS[ink])
            regions += word_regions(letters, word, ink, x - left, y - top)
        return canvas, tuple(regions)

    def questions(self, split: Split, image: int) -> list[Question]:
        return [
            Question(image, f"spell the {ink} word.", spelt(word), "word") for word, ink in self._written(split, image)
        ]
