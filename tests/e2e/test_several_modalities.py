"""Prompts with images, videos and audio: all that is spliced in is visual but audio, whichever graph does it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import avl_fx
from avl_fx import Plan
from avl_fx.record import recording
from avl_fx.spliced_rows import SplicedRows
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, largest, through
from tests.e2e.test_avl import PRESETS, as_oracle, blocks_of
from tests.oracle import avl_oracle, lazy_oracle
from tests.passes._decoder import WIDTH, Decoder, inheriting, specs
from tests.zoo import ZOO
from tests.zoo._base import BOS, FIRST_TEXT, IMAGE, LAST_TEXT, VIDEO, VISION_END, VISION_START
from tests.zoo._qwen import PATCH, TEMPORAL
from tests.zoo._run import prefill_and_decode

# ---- a model that splices three modalities in, in as many graphs as it is told to ------------------------------------

AUDIO = 249
IDS = torch.tensor([[1, IMAGE, IMAGE, 4, AUDIO, VIDEO, 6, AUDIO], [7, AUDIO, IMAGE, 9, VIDEO, VIDEO, 8, 8]])
VISUAL = (IDS == IMAGE) | (IDS == VIDEO)
TABLE = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(3, 3, WIDTH, generator=torch.Generator().manual_seed(1))
"""Of sounds, pictures and frames: three positions each."""
CAUSAL = torch.ones(8, 8, dtype=torch.bool).tril().repeat(2, 1, 1, 1)


class Spliced(Decoder):
    """Three layers behind three splices. ``apart``: what is a graph of its own."""

    def __init__(self, apart: str) -> None:
        super().__init__(specs(3))
        self.apart = apart
        self.config = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO)

    def forward(self, ids: Tensor) -> list[Tensor]:
        x = F.embedding(ids, TABLE)
        sounds, pictures, frames = (ids == token for token in (AUDIO, IMAGE, VIDEO))
        if "masks" in self.apart:
            torch._dynamo.graph_break()
        sounds, pictures, frames = sounds.unsqueeze(-1), pictures.unsqueeze(-1), frames.unsqueeze(-1)
        if "views" in self.apart:
            torch._dynamo.graph_break()
        x = x.masked_scatter(sounds.expand_as(x), FEATURES[0])
        if "sounds" in self.apart:
            torch._dynamo.graph_break()
        x = x.masked_scatter(pictures.expand_as(x), FEATURES[1])
        if "pictures" in self.apart:
            torch._dynamo.graph_break()
        x = x.masked_scatter(frames.expand_as(x), FEATURES[2])
        if "frames" in self.apart:
            torch._dynamo.graph_break()
        out = []
        for layer in self.each():
            x, pair = layer(x, CAUSAL, ("first",), None)
            out += pair
        return [x, *out]


PLANS = {"vla": Plan.lazy([(0, 2)], "vla"), "vla_scores": Plan.lazy([(0, 2)], "vla_scores")}


@pytest.mark.parametrize("apart", ["", "sounds", "pictures", "sounds pictures frames", "masks", "masks views pictures"])
@pytest.mark.parametrize("plan", PLANS)
def test_audio_is_text_and_what_several_graphs_splice_in_is_put_together(plan, apart):
    torch._dynamo.reset()
    model = Spliced(apart).eval()
    with torch.no_grad():
        dense = model(IDS)
        with through("torch.compile", model, compiler="eager", plan=PLANS[plan]) as recorder:
            got = model(IDS)
    assert len(recorder.graphs) == 1 + len(apart.split())
    assert len(recorder.visual) == 1, "one forward"
    assert torch.equal(recorder.visual[0], VISUAL)
    assert largest(got, dense) > 0.1
    x = F.embedding(IDS, TABLE)
    for token, features in zip((AUDIO, IMAGE, VIDEO), FEATURES, strict=True):
        x = x.masked_scatter((token == IDS)[..., None], features)
    assert largest(got, inheriting(model, plan, x, VISUAL, CAUSAL)) <= FLOAT32_TOLERANCE


# ---- a model whose part generates, as Qwen2.5-Omni's does ------------------------------------------------------------


class Whole(nn.Module):
    """Its own forward is never called."""

    def __init__(self, thinker):
        super().__init__()
        self.thinker, self.config = thinker, thinker.config
        self.talker = nn.Linear(2, 2)

    def generate(self, **inputs):
        return self.thinker.generate(**inputs, max_new_tokens=2)


def test_the_part_that_generates_is_asked_for_token_ids(monkeypatch):
    """What is spliced into embeddings may be audio; ids say what is an image."""
    monkeypatch.delattr(SplicedRows, "positions")
    zoo = ZOO["llava"]
    model = Whole(zoo.make())
    inputs = zoo.inputs(model.thinker, batch=2)
    torch._dynamo.reset()
    avl_fx.compile(model, PLANS["vla"], options={"compiler": "eager"})
    with recording() as recorder:
        model.generate(**inputs)
    avl_fx.uncompile(model)
    assert torch.equal(recorder.visual[0], zoo.visual_positions(model.thinker, inputs))
    assert not model.thinker._forward_pre_hooks


# ---- an image and a video in one prompt ------------------------------------------------------------------------------

CASES = [
    ("qwen2_5_vl", "torch.compile", "avl"),
    ("qwen2_5_vl", "torch.compile", "vla_scores"),
    ("qwen2_5_vl", "avl_fx.compile", "avl"),
    ("qwen2_vl", "torch.compile", "vla"),
    ("qwen2_vl", "avl_fx.compile", "vla_scores"),
    ("qwen3_vl", "avl_fx.compile", "avl"),
    ("qwen3_vl", "avl_fx.compile", "vla"),
]


def with_a_video(zoo, model):
    """A prompt of two images, whose second one is called a video."""
    inputs = dict(zoo.inputs(model, batch=1))
    grids = inputs.pop("image_grid_thw")
    patches = inputs.pop("pixel_values").split(grids.prod(-1).tolist())
    ids, types = inputs["input_ids"].clone(), inputs["mm_token_type_ids"].clone()
    film = (ids == IMAGE) & ((ids == IMAGE).cumsum(1) > len(patches[0]) // 4)
    ids[film], types[film] = VIDEO, 2
    inputs |= {"pixel_values": patches[0], "image_grid_thw": grids[:1]}
    inputs |= {"pixel_values_videos": patches[1], "video_grid_thw": grids[1:]}
    return {**inputs, "input_ids": ids, "mm_token_type_ids": types}


@pytest.mark.parametrize(("name", "door", "kind"), rest_in_matrix(CASES, CASES[:1], apart=True))
def test_an_image_and_a_video_in_one_prompt(name, door, kind):
    model = ZOO[name].make()
    inputs = with_a_video(ZOO[name], model)
    equals_the_oracle(ZOO[name], model, inputs, door, kind)


# ---- images in many pieces -------------------------------------------------------------------------------------------


def in_pieces(pieces=90):
    """A prompt of so many small images with text between them, as a video whose frames have their times before them."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(FIRST_TEXT, LAST_TEXT, (pieces, 3), generator=generator)
    frames = [[*words[:2], VISION_START, *[IMAGE] * 4, VISION_END, words[2]] for words in text.tolist()]
    ids = torch.tensor([sum(frames, [BOS])])
    pixels = torch.randn(pieces * 16, 3 * TEMPORAL * PATCH**2, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * pieces),
    }


@pytest.mark.parametrize("kind", ["avl", pytest.param("vla_scores", marks=pytest.mark.matrix)])
def test_images_in_many_pieces(kind):
    zoo = ZOO["qwen2_5_vl"]
    model = zoo.make()
    equals_the_oracle(zoo, model, in_pieces(), "avl_fx.compile", kind)


# ---- both ------------------------------------------------------------------------------------------------------------


def equals_the_oracle(zoo, model, inputs, door, kind, steps=6):
    """All images and videos of a prompt are visual: a plan's answer is the oracle's, and not the dense one."""
    settings, where = PRESETS["paper"], (zoo.decoder_prefix, zoo.attention_kinds)
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    dense = prefill_and_decode(model, inputs, "dynamic", steps=steps)
    if kind == "avl":
        plan = Plan.avl(**settings, text=None)
        oracle = avl_oracle(model, visual, decoder_prefix=where[0], kinds=where[1], **as_oracle(settings))
    else:
        plan = Plan.lazy(blocks_of(zoo), kind)
        oracle = lazy_oracle(model, blocks_of(zoo), *where, kind, visual)
    with oracle:
        expected = prefill_and_decode(model, inputs, "dynamic", steps=steps, tokens=dense.tokens)
    with through(door, model, compiler="eager", plan=plan) as recorder:
        got = prefill_and_decode(model, inputs, "dynamic", steps=steps, tokens=dense.tokens)
    assert torch.equal(recorder.visual[0], visual)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert largest(got, dense) > 10 * FLOAT32_TOLERANCE
