"""What a projector is told patch by patch, and that it learns it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from examples.petite_vlm import align
from examples.petite_vlm.align import Alignment, Patches, alignment_loss, recognised
from examples.petite_vlm.data import LOCATED, canvas
from examples.petite_vlm.data.lettering import fitting, ink_box, spelling, word_regions
from examples.petite_vlm.data.regions import VOCABULARY, Region
from examples.petite_vlm.labels import GROUPS, WordDirections, patch_targets
from examples.petite_vlm.model import ADAPTER, load_petite_vlm, read_adapter, trained_at

from .test_petite_vlm import tiny_model

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
SIDE = 12
WIDTH = 32


class Spelt:
    """A tokenizer for which a word is its letters, modulo a small vocabulary."""

    def __call__(self, word: str) -> dict[str, list[int]]:
        return {"input_ids": [hash_of(letter) for letter in word]}


def hash_of(letter: str) -> int:
    return (7 * ord(letter)) % 2048


def directions(width: int = WIDTH) -> WordDirections:
    torch.manual_seed(0)
    return WordDirections(Spelt(), torch.randn(2048, width))  # type: ignore[arg-type]


# ---- targets ---------------------------------------------------------------------------------------------------------


@st.composite
def boxes(draw: Any) -> tuple[float, float, float, float]:
    left, top = (draw(st.floats(0, canvas.SIZE - 1)) for _ in range(2))
    return left, top, draw(st.floats(left, canvas.SIZE)), draw(st.floats(top, canvas.SIZE))


@settings(max_examples=60, deadline=None)
@given(boxes(), st.sampled_from([6, 12, 16, 24]))
def test_patches_of_a_box(box, side):
    """All of them lie in it, or it is so small that the one of its middle speaks for it."""
    target = patch_targets([Region(box, {"name": "cat"})], side)["name"]
    said = (target[:, -1] == 0).nonzero().flatten()
    assert len(said)
    assert (target[said].argmax(1) == GROUPS["name"].index("cat")).all()
    torch.testing.assert_close(target.sum(1), torch.ones(side * side))
    patch = canvas.SIZE / side
    for number in said.tolist():
        row, column = divmod(number, side)
        for at, low, high in ((column, box[0], box[2]), (row, box[1], box[3])):
            inside = low <= (at + 0.5) * patch <= high
            assert inside or at == min(side - 1, int((low + high) / 2 / patch))


def test_a_patch_with_two_letters_shares_itself_out():
    middle = (100.0, 100.0, 100.0, 100.0)
    target = patch_targets([Region(middle, {"letter": "i"}), Region(middle, {"letter": "l"})], SIDE)["letter"]
    shown = target[target[:, -1] == 0]
    assert shown.shape[0] == 1
    assert shown[0, [VOCABULARY["letter"].index(letter) for letter in "il"]].tolist() == [0.5, 0.5]


def test_every_patch_knows_its_third():
    target = patch_targets([], SIDE)
    rows, columns = (target[group].argmax(1).view(SIDE, SIDE) for group in ("row", "column"))
    assert rows[:, 0].tolist() == columns[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (rows == rows[:, :1]).all()
    assert (columns == columns[:1]).all()
    assert all((target[group][:, -1] == 1).all() for group in VOCABULARY)


# ---- where letters are -----------------------------------------------------------------------------------------------


def test_letters_stand_in_order_inside_their_word():
    letters = fitting(DEJAVU, 60, "Mild", 90, step=2)
    assert letters.getlength("Mild") <= 90 < ImageFont.truetype(str(DEJAVU), 60).getlength("Mild")
    whole, *each = word_regions(letters, "Mild", "red", 30, 40)
    assert whole.says == {"kind": "word", "colour": "red"}
    assert [region.says for region in each] == [{"letter": letter} for letter in "mild"]
    across = [region.box[0] for region in each]
    assert across == sorted(across)
    assert whole.box[0] < across[0]
    assert across[-1] < whole.box[2]
    assert {region.box[1] for region in each} == {(whole.box[1] + whole.box[3]) / 2}


def test_what_a_word_covers_is_where_its_ink_is():
    letters = ImageFont.truetype(str(DEJAVU), 40)
    picture = Image.new("L", (400, 100), 0)
    ImageDraw.Draw(picture).text((20, 15), "17 apples", font=letters, fill=255)
    found, box = picture.getbbox(), ink_box(letters, "17 apples", 20, 15)
    assert found is not None
    assert all(abs(edge - drawn) <= 4 for edge, drawn in zip(box, found, strict=True))
    assert [next(iter(r.says)) for r in spelling(letters, "17a", 0, 0)] == ["digit", "digit", "letter"]


# ---- learning --------------------------------------------------------------------------------------------------------


def test_a_words_own_embedding_scores_best():
    scored = directions(512)
    torch.manual_seed(0)
    embedding = torch.randn(2048, 512)
    for group, words in GROUPS.items():
        ids = [[hash_of(letter) for text in (word, f" {word}") for letter in text] for word in words]
        vectors = torch.stack([embedding[some].mean(0) for some in ids])
        scores = scored(vectors)[group]
        assert scores.shape == (len(words), len(words) + 1)
        right = (scores[:, :-1].argmax(1) == torch.arange(len(words))).float().mean()
        assert right > 0.9, group
    assert scored.length(scored.get_buffer("middle")) == 0


def planted() -> Patches:
    """Features that are one of six random vectors, each of which is said to be another animal, or none."""
    torch.manual_seed(1)
    kinds = torch.randint(6, (600,))
    targets = {group: torch.zeros(600, len(words) + 1) for group, words in GROUPS.items()}
    for group, share in targets.items():
        share[torch.arange(600), kinds if group == "name" else -1] = 1.0
    targets["name"][kinds == 5] = 0.0
    targets["name"][kinds == 5, -1] = 1.0
    features = torch.randn(6, 16)[kinds] + 0.05 * torch.randn(600, 16)
    return Patches(features.half(), {group: share.half() for group, share in targets.items()})


def test_a_projector_learns_what_it_is_told(monkeypatch: pytest.MonkeyPatch):
    model, patches = tiny_model(), planted()
    monkeypatch.setattr(align, "WordDirections", lambda tokenizer, embedding: directions())
    processor: Any = type("P", (), {"tokenizer": None})
    recipe = Alignment(steps=150, patches=128, rate=1e-2)
    scored, curve = align.align(model, processor, recipe, patches)
    assert curve[-1] < 0.5 * curve[0]
    found = recognised(scored, model.model.multi_modal_projector, patches)["name"]
    assert found["word"] > 0.98
    assert found["said"] > 0.95
    assert found["false"] < 0.05
    again = tiny_model()
    assert align.align(again, processor, recipe, patches)[1] == curve
    assert not any(p.requires_grad for p in again.model.multi_modal_projector.parameters())


def test_a_projector_goes_on_from_what_it_knows(monkeypatch: pytest.MonkeyPatch):
    model, patches = tiny_model(), planted()
    monkeypatch.setattr(align, "WordDirections", lambda tokenizer, embedding: directions())
    processor: Any = type("P", (), {"tokenizer": None})
    first = align.align(model, processor, Alignment(steps=150, patches=128, rate=1e-2), patches)[1]
    more = align.align(model, processor, Alignment(steps=3, patches=128, rate=1e-3, start="an adapter"), patches)[1]
    assert more[0] < 0.5 * first[0]


def test_what_shows_nothing_weighs_less():
    scored, patches = directions(), planted()
    x = torch.randn(600, WIDTH)
    whole = alignment_loss(scored, x, patches.targets)
    shows = patches.targets["name"][:, -1] == 0
    parts = [
        alignment_loss(scored, x[some], {g: t[some] for g, t in patches.targets.items()}) for some in (shows, ~shows)
    ]
    assert min(parts) < whole < max(parts)


@pytest.mark.slow
def test_the_file_is_one_to_go_on_from(tmp_path: Path):
    """Real parts, few pictures: the model loads it, with the layers and the size that it was made for."""
    out = tmp_path / "aligned.safetensors"
    align.main(out, "sheets:8,scenes:16", 112, "4,-3", steps=60, seed=0, held_out=8)
    described = json.loads(out.with_suffix(".json").read_text())
    assert described["held_out"]["scenes"]["row"]["said"] > 0.5
    assert described["loss"]
    model, processor = load_petite_vlm(adapter=out)
    assert (processor.image_size, model.config.vision_feature_layer) == (112, [4, -3])
    inputs = processor.prepare([LOCATED["scenes"].picture("test", 0)], ["which animal is there?"])
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    more = tmp_path / "more.safetensors"
    align.main(more, "sheets:8", start=ADAPTER, steps=3, rate=1e-4, held_out=2)
    assert trained_at(more) == trained_at(ADAPTER)
    (before, scale), (after, its_scale) = read_adapter(ADAPTER), read_adapter(more)
    assert before.keys() == after.keys()
    assert scale == its_scale
    assert {name.partition(".")[0] for name in before if not before[name].equal(after[name])} == {"projector"}
    with pytest.raises(typer.BadParameter, match="does not say where things are"):
        align.main(out, "captions:8", 112, "-3", steps=1, seed=0, held_out=1)
