"""Canvases of several things, asked about one by one (`composites`) or described whole (`scenes`).

What is asked about covers a few of some hundred patches, and every thing is asked about: whoever drops patches at
random drops answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

from PIL import Image

from .canvas import COLOURS, PLACES, SHAPES, ground, place, shape
from .cutouts import NAMED, Kind, digit, digits, emoji
from .questions import Question, Split, Task, seeded
from .regions import Box, Region

COUNTED = ("one", "two", "three", "four")


@dataclass(frozen=True)
class Thing:
    """Something in a cell."""

    kind: str
    """A `Kind`, ``digit`` or ``shape``."""
    name: str
    """How a description calls it: ``cat``, ``digit 7``, ``red star``."""
    cell: int
    box: Box

    @property
    def region(self) -> Region:
        """Where it is, and what."""
        if self.kind == "shape":
            colour, form = self.name.split()
            return Region(self.box, {"kind": "shape", "colour": colour, "name": form})
        if self.kind == "digit":
            return Region(self.box, {"kind": "digit", "digit": self.name.removeprefix("digit ")})
        return Region(self.box, {"kind": self.kind, "name": self.name})


@dataclass(frozen=True)
class Scene:
    """A canvas and what is on it, cells in reading order."""

    picture: Image.Image
    things: tuple[Thing, ...]


@lru_cache(maxsize=256)
def scene(name: str, split: Split, image: int, fewest: int, most: int) -> Scene:
    """Between ``fewest`` and ``most`` things (at most nine) in distinct cells: one of each kind before a second of any.

    All shapes of a scene are alike, in form and colour.
    """
    draw = seeded(name, split, image)
    canvas = ground(draw)
    kinds = [*draw.sample(get_args(Kind), 4), "digit"]
    draw.shuffle(kinds)
    kinds = ["shape", *kinds][: draw.randint(fewest, most)] if fewest < 6 else ["shape", *kinds]
    cells = draw.sample(range(9), 9)
    things: list[Thing] = []
    for kind in kinds:
        if kind == "shape":
            form, colour = draw.choice(SHAPES), draw.choice(tuple(COLOURS))
            copies = draw.randint(1, min(4, 9 - len(kinds) + 1))
            size = draw.randint(40, 84)
            for _ in range(copies):
                cell = cells.pop()
                box = place(canvas, shape(form, colour, size, draw.uniform(-12, 12)), cell, size, draw)
                things.append(Thing("shape", f"{colour} {form}", cell, box))
            continue
        cell = cells.pop()
        if kind == "digit":
            thing, said = digit(split, draw.randrange(digits(split)))
            name_ = f"digit {said}"
        else:
            short = draw.choice(tuple(NAMED[kind]))
            thing, name_ = emoji(short), NAMED[kind][short]
            if draw.random() < 0.5:
                thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = place(canvas, thing, cell, draw.randint(56, 104), draw)
        things.append(Thing(kind, name_, cell, box))
    return Scene(canvas, tuple(sorted(things, key=lambda thing: thing.cell)))


class _OfScenes:
    """Data sets that ask about canvases of several things."""

    name: str
    _many: tuple[int, int]

    def images(self, split: Split) -> int:
        return 1000 if split == "test" else 1_000_000

    def _scene(self, split: Split, image: int) -> Scene:
        return scene(self.name, split, image, *self._many)

    def picture(self, split: Split, image: int) -> Image.Image:
        return self._scene(split, image).picture

    def regions(self, split: Split, image: int) -> tuple[Region, ...]:
        return tuple(thing.region for thing in self._scene(split, image).things)


class Composites(_OfScenes):
    """What, which, where, how many and which colour, one thing at a time."""

    name = "composites"
    task: Task = "vqa"
    max_new_tokens = 6
    _many = 4, 6

    def questions(self, split: Split, image: int) -> list[Question]:
        things = self._scene(split, image).things
        asked: list[tuple[str, str, str]] = []
        shapes = [thing for thing in things if thing.kind == "shape"]
        colour, form = shapes[0].name.split()
        asked.append((f"which colour is the {form}?", colour, "colour"))
        asked.append((f"how many shapes of the form {form} are there?", COUNTED[len(shapes) - 1], "how many"))
        for thing in things:
            if thing.kind == "digit":
                asked.append(("which digit is there?", thing.name.removeprefix("digit "), "digit"))
            elif thing.kind != "shape":
                asked.append((f"which {thing.kind} is there?", thing.name, "what"))
                asked.append((f"where is the {thing.name}?", PLACES[thing.cell], "where"))
        return [Question(image, *question) for question in asked]


class Scenes(_OfScenes):
    """The whole canvas in one sentence, in reading order: long answers that need all of the picture, to their end."""

    name = "scenes"
    task: Task = "caption"
    max_new_tokens = 112
    _many = 6, 6

    def questions(self, split: Split, image: int) -> list[Question]:
        things = self._scene(split, image).things
        said = "; ".join(f"{PLACES[thing.cell]}: {thing.name}" for thing in things)
        return [Question(image, "describe the picture.", said, "scene")]
