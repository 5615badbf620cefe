"""The data sets: what is asked is on the picture, and nothing is in two splits. (slow: of the real packages.)"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from examples.petite_vlm.data import (
    DATASETS,
    LOCATED,
    archives,
    canvas,
    cutouts,
    documents,
    scenes,
    sheets,
    words,
)
from examples.petite_vlm.data.regions import VOCABULARY
from examples.petite_vlm.sources import parse_mixture

NAMES = sorted(DATASETS)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what comes out of packages."""
    square = Image.new("RGBA", (64, 64), (9, 200, 9, 255))
    monkeypatch.setattr(scenes, "emoji", lambda name: square)
    monkeypatch.setattr(scenes, "digits", lambda split: 10)
    monkeypatch.setattr(scenes, "digit", lambda split, number: (square, str(number)))
    dejavu = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    for module in (documents, words, sheets):
        monkeypatch.setattr(module, "fonts", lambda split: (dejavu,))
    for module in (words, sheets):
        monkeypatch.setattr(module, "words", lambda split: WORDS[split])
    for cached in (scenes.scene, documents._document):
        cached.cache_clear()


WORDS = {"train": ("maple", "stone", "cloud", "plate"), "test": ("river", "glass", "bread", "north")}
MADE = ["composites", "documents", "scenes", "words"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", MADE)
def test_a_picture_depends_on_its_number_alone(name: str):
    dataset = DATASETS[name]
    first = [(dataset.picture("test", i).tobytes(), dataset.questions("test", i)) for i in range(4)]
    for cached in (scenes.scene, documents._document):
        cached.cache_clear()
    assert first[::-1] == [
        (dataset.picture("test", i).tobytes(), dataset.questions("test", i)) for i in range(3, -1, -1)
    ]
    assert len({pixels for pixels, _ in first}) == 4
    assert all(question.image == i and question.answer for i, (_, asked) in enumerate(first) for question in asked)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", MADE)
def test_splits_differ(name: str):
    dataset = DATASETS[name]
    assert dataset.picture("train", 0).tobytes() != dataset.picture("test", 0).tobytes()


@pytest.mark.usefixtures("offline")
def test_questions_of_a_composite_have_one_answer():
    for image in range(60):
        things = scenes.scene("composites", "train", image, 4, 6).things
        assert len({thing.cell for thing in things}) == len(things) <= 9
        asked = DATASETS["composites"].questions("train", image)
        assert len({question.text for question in asked}) == len(asked)
        named = {thing.name: canvas.PLACES[thing.cell] for thing in things if thing.kind != "shape"}
        for question in asked:
            if question.kind == "where":
                assert question.answer == named[question.text.removeprefix("where is the ").removesuffix("?")]
        shapes = [thing for thing in things if thing.kind == "shape"]
        assert len({thing.name for thing in shapes}) == 1
        count = next(q.answer for q in asked if q.kind == "how many")
        assert scenes.COUNTED.index(count) + 1 == len(shapes)


@pytest.mark.usefixtures("offline")
def test_every_kind_of_question_occurs():
    kinds = {q.kind for image in range(30) for q in DATASETS["composites"].questions("test", image)}
    assert kinds == {"what", "where", "how many", "colour", "digit"}
    assert {q.kind for image in range(30) for q in DATASETS["documents"].questions("test", image)} == set(
        documents.FORMS
    )


@pytest.mark.usefixtures("offline")
def test_a_scene_is_described_in_reading_order():
    for image in range(20):
        (question,) = DATASETS["scenes"].questions("test", image)
        places = [part.partition(": ")[0] for part in question.answer.split("; ")]
        assert places == [place for place in canvas.PLACES if place in places]
        assert len(places) >= 6


@pytest.mark.usefixtures("offline")
def test_a_receipt_adds_up():
    totals = 0
    for image in range(40):
        asked = DATASETS["documents"].questions("train", image)
        if asked[0].kind == "receipt":
            *prices, total = (int(question.answer) for question in asked)
            assert asked[-1].text == "how much is the total?"
            assert sum(prices) == total
            totals += 1
    assert totals > 5


@pytest.mark.usefixtures("offline")
def test_words_are_asked_for_by_their_ink():
    for image in range(10):
        asked = DATASETS["words"].questions("test", image)
        inks = {question.text.split()[2] for question in asked}
        assert len(asked) == len(inks) == words.COUNT
        assert all(question.answer.replace(" ", "") in WORDS["test"] for question in asked)
        pixels = {colour for _, colour in DATASETS["words"].picture("test", image).getcolors(2**20)}
        assert all(canvas.COLOURS[ink] in pixels for ink in inks)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", sorted(LOCATED))
def test_regions_speak_of_what_is_there(name: str):
    """Inside the canvas, in known words, and of all that is asked for by name."""
    data = LOCATED[name]
    for image in range(12):
        regions = data.regions("train", image)
        assert regions
        assert regions == data.regions("train", image)
        for region in regions:
            left, top, right, bottom = region.box
            assert 0 <= left <= right <= canvas.SIZE
            assert -4 <= top <= bottom <= canvas.SIZE + 4  # type may stand out of its line
            assert all(word in VOCABULARY[group] for group, word in region.says.items())


@pytest.mark.usefixtures("offline")
def test_a_things_region_is_in_its_place():
    for image in range(20):
        found = scenes.scene("composites", "train", image, 4, 6)
        for thing in found.things:
            row, column = divmod(thing.cell, 3)
            left, top, right, bottom = thing.region.box
            assert column * canvas.CELL <= left < right <= (column + 1) * canvas.CELL
            assert row * canvas.CELL <= top < bottom <= (row + 1) * canvas.CELL
            assert " ".join(thing.region.says.values()).endswith(thing.name.split()[-1])


@pytest.mark.usefixtures("offline")
def test_letters_of_a_word_are_in_its_ink():
    for image in range(10):
        regions = DATASETS["words"].regions("test", image)  # type: ignore[attr-defined]
        inks = [region.says["colour"] for region in regions if "colour" in region.says]
        assert {f"spell the {ink} word." for ink in inks} == {
            q.text for q in DATASETS["words"].questions("test", image)
        }
        letters = "".join(region.says["letter"] for region in regions if "letter" in region.says)
        assert sorted(letters) == sorted(
            "".join(q.answer.replace(" ", "") for q in DATASETS["words"].questions("test", image))
        )


@pytest.mark.parametrize("form", canvas.SHAPES)
def test_a_shape_is_of_its_colour(form: str):
    red, green, blue, alpha = canvas.shape(form, "blue", 60).getpixel((30, 30))
    assert (red, green, blue) == canvas.COLOURS["blue"]
    assert alpha == 255
    assert canvas.shape(form, "blue", 60).getpixel((0, 0))[3] == 0


def test_things_stay_in_their_cell():
    draw = canvas.random.Random(0)
    for cell in range(9):
        board = Image.new("RGB", (canvas.SIZE, canvas.SIZE))
        canvas.place(board, Image.new("RGBA", (20, 10), (255, 0, 0, 255)), cell, canvas.CELL, draw)
        left, top, right, bottom = board.getbbox()
        row, column = divmod(cell, 3)
        assert column * canvas.CELL <= left < right <= (column + 1) * canvas.CELL
        assert row * canvas.CELL <= top < bottom <= (row + 1) * canvas.CELL


# --------------------------------------------------------------------------------------------------------- packages


def packed(names: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def debian(members: dict[str, bytes]) -> bytes:
    content = b"!<arch>\n"
    for name, body in members.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
    return content


@pytest.mark.parametrize("odd", [b"2.0", b"2.0\n"])
def test_a_debian_package_is_read(tmp_path: Path, odd: bytes):
    path = tmp_path / "a.deb"
    tar = packed({"./usr/a.txt": b"hello"})
    path.write_bytes(debian({"debian-binary": odd, "control.tar.xz": b"x" * 7, "data.tar.xz": tar}))
    with archives.open_tar(path) as archive:
        assert archive.extractfile("./usr/a.txt").read() == b"hello"


def test_what_is_no_debian_package_is_refused(tmp_path: Path):
    path = tmp_path / "a.deb"
    path.write_bytes(debian({"debian-binary": b"2.0\n"}))
    with pytest.raises(ValueError, match="not a Debian package"):
        archives.open_tar(path)


def test_a_package_without_the_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AVL_FX_CACHE", str(tmp_path))
    path = tmp_path / "a.deb"
    path.write_bytes(debian({"data.tar.xz": packed({"./a.txt": b"1", "./b/a.txt": b"2"})}))
    monkeypatch.setattr(archives, "fetch", lambda part: path)
    part = archives.Part("a", "1", "a.deb", "0" * 64, "none", "debian")
    with pytest.raises(ValueError, match="none of the files"):
        archives.unpacked(part, lambda name: name.endswith(".png"))
    with pytest.raises(ValueError, match=r"two files called a\.txt"):
        archives.unpacked(part, lambda name: name.endswith(".txt"))
    found = archives.unpacked(part, lambda name: name.endswith("b/a.txt"))
    assert (found / "a.txt").read_bytes() == b"2"


def test_each_source_has_its_command():
    made = {s: archives.Part("a", "1", "a", "0", "none", s).command for s in ("pip", "debian", "npm")}
    assert made["pip"][-1] == "a==1"
    assert made["debian"][-1] == "a=1"
    assert made["npm"][-1] == "a@1"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nothing", "is no data set: choose among"),
        ("words:0", "positive"),
        ("words:x", "positive"),
        ("", "no data set"),
    ],
)
def test_a_wrong_mixture_is_refused(data: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_mixture(data)


def test_a_mixture_is_read():
    assert parse_mixture("words:2, composites") == {"words": 2.0, "composites": 1.0}


# ------------------------------------------------------------------------------------------------ the real packages


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_real_data_sets_are_whole(name: str):
    dataset = DATASETS[name]
    for split in ("train", "test"):
        assert dataset.images(split) >= 80
        for image in (0, dataset.images(split) - 1):
            assert dataset.picture(split, image).mode == "RGB"
            assert dataset.questions(split, image)


@pytest.mark.slow
def test_no_word_stamp_or_digit_is_in_two_splits():
    assert not set(words.words("train")) & set(words.words("test"))
    assert not {s.caption for s in cutouts.stamps("train")} & {s.caption for s in cutouts.stamps("test")}
    assert not set(cutouts._rows("train")) & set(cutouts._rows("test"))
    assert not {p.name for p in documents.fonts("train")} & {p.name for p in documents.fonts("test")}


@pytest.mark.slow
def test_every_named_emoji_is_there():
    for kind in cutouts.NAMED.values():
        assert len(set(kind.values())) == len(kind)
        for short_name in kind:
            assert cutouts.emoji(short_name).size == (64, 64)
