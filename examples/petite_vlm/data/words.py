"""Rendered words, to be spelt: no test word and no test font was seen in training."""

from __future__ import annotations

import re
from functools import cache

from PIL import Image, ImageDraw
from transformers import AutoTokenizer

from examples.petite_vlm.convert import language_dir

from .canvas import COLOURS, SIZE, ground
from .fonts import font, fonts
from .questions import Question, Split, Task, seeded

SMALLEST, LARGEST = 36, 96
"""Pixels of the type on a canvas of 336: a letter of the smallest covers about one patch of 14 at 224 pixels."""


@cache
def words(split: Split) -> tuple[str, ...]:
    """English words of three to six letters: whole words of the language model's vocabulary. Every tenth is tested."""
    vocabulary = AutoTokenizer.from_pretrained(language_dir()).get_vocab()
    found = sorted({token[1:] for token in vocabulary if re.fullmatch(r"Ġ[a-z]{3,6}", token)})
    return tuple(word for place, word in enumerate(found) if (place % 10 == 0) == (split == "test"))


def spelt(word: str) -> str:
    """How a word is answered: letter by letter, so that an unseen word asks for nothing but reading."""
    return " ".join(word)


class Words:
    """One word somewhere on a canvas, small to large, in capitals, lower case or both."""

    name = "words"
    task: Task = "ocr"
    max_new_tokens = 8

    def images(self, split: Split) -> int:
        return 1000 if split == "test" else 1_000_000

    def _word(self, split: Split, image: int) -> str:
        return seeded(f"{self.name} word", split, image).choice(words(split))

    def picture(self, split: Split, image: int) -> Image.Image:
        draw = seeded(self.name, split, image)
        word = draw.choice((str.upper, str.lower, str.capitalize))(self._word(split, image))
        canvas = ground(draw)
        size = draw.randint(SMALLEST, LARGEST)
        letters = font(draw.choice(fonts(split)), size)
        while letters.getlength(word) > SIZE - 16:
            size -= 4
            letters = font(letters.path, size)  # type: ignore[arg-type]
        left, top, right, bottom = letters.getbbox(word)
        x = draw.randint(4, max(4, int(SIZE - 4 - (right - left))))
        y = draw.randint(4, max(4, int(SIZE - 4 - (bottom - top))))
        ink = draw.choice([colour for colour in COLOURS if colour not in ("yellow", "orange")])
        ImageDraw.Draw(canvas).text((x - left, y - top), word, font=letters, fill=COLOURS[ink])
        return canvas

    def questions(self, split: Split, image: int) -> list[Question]:
        return [Question(image, "spell the word.", spelt(self._word(split, image)), "word")]
