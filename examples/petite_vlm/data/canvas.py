"""A canvas of nine cells with things in them: the places have names, so that questions can ask for them."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

SIZE = 336
"""Pixels of a canvas; models look at it as they like."""
CELL = SIZE // 3
PLACES = (
    "top left",
    "top middle",
    "top right",
    "middle left",
    "center",
    "middle right",
    "bottom left",
    "bottom middle",
    "bottom right",
)
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (246, 206, 36),
    "green": (56, 142, 60),
    "blue": (33, 102, 204),
    "purple": (123, 44, 191),
    "black": (24, 24, 24),
    "brown": (121, 74, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")


def ground(draw: random.Random) -> Image.Image:
    """A pale canvas: plain, a slope between two colours, or stripes."""
    first = tuple(draw.randint(205, 255) for _ in range(3))
    second = tuple(draw.randint(205, 255) for _ in range(3))
    kind = draw.choice(("plain", "slope", "stripes"))
    if kind == "plain":
        return Image.new("RGB", (SIZE, SIZE), first)
    ramp = Image.linear_gradient("L").resize((SIZE, SIZE))
    if kind == "stripes":
        width = draw.randint(6, 24)
        ramp = Image.new("L", (SIZE, SIZE), 0)
        pen = ImageDraw.Draw(ramp)
        for start in range(0, SIZE, 2 * width):
            pen.rectangle((start, 0, start + width - 1, SIZE), fill=255)
    turned = ramp.rotate(draw.choice((0, 90, 180, 270)))
    return Image.composite(Image.new("RGB", (SIZE, SIZE), first), Image.new("RGB", (SIZE, SIZE), second), turned)


def sized(thing: Image.Image, side: int) -> Image.Image:
    """``thing`` with its longer side ``side`` pixels."""
    scale = side / max(thing.size)
    width, height = (max(1, round(edge * scale)) for edge in thing.size)
    return thing.resize((width, height), Image.Resampling.LANCZOS)


def place(
    canvas: Image.Image, thing: Image.Image, cell: int, size: int, draw: random.Random
) -> tuple[int, int, int, int]:
    """Paste ``thing`` (RGBA), its longer side ``size`` pixels, somewhere in one of the nine cells; what it covers."""
    thing = sized(thing, size)
    row, column = divmod(cell, 3)
    x = column * CELL + draw.randint(0, max(0, CELL - thing.width))
    y = row * CELL + draw.randint(0, max(0, CELL - thing.height))
    canvas.paste(thing, (x, y), thing)
    return x, y, x + thing.width, y + thing.height


def shape(name: str, colour: str, size: int, turn: float = 0.0) -> Image.Image:
    """RGBA, ``size`` pixels wide; drawn four times as large and made small, so that edges are smooth."""
    large = 4 * size
    picture = Image.new("RGBA", (large, large), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    fill = (*COLOURS[colour], 255)
    middle, radius = large / 2, 0.47 * large
    if name == "circle":
        pen.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=fill)
    elif name == "cross":
        arm = 0.3 * radius
        pen.rectangle((middle - radius, middle - arm, middle + radius, middle + arm), fill=fill)
        pen.rectangle((middle - arm, middle - radius, middle + arm, middle + radius), fill=fill)
    else:
        corners = {"square": 4, "triangle": 3, "star": 10}[name]
        inner = 0.42 if name == "star" else 1.0
        start = math.pi / 4 if name == "square" else -math.pi / 2
        points = []
        for i in range(corners):
            r = radius * (inner if i % 2 and name == "star" else 1.0)
            angle = start + 2 * math.pi * i / corners
            points.append((middle + r * math.cos(angle), middle + r * math.sin(angle)))
        pen.polygon(points, fill=fill)
    return picture.rotate(turn, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.LANCZOS)
