"""Layers whose attention a model's configuration calls something else than full or sliding: Llama 4's chunks.

Three of four layers see the current chunk of 16 tokens, with RoPE; the fourth sees everything, without. Short prompts
do not show the difference: no layer has a mask then. A static cache gives chunked layers buffers as long as a chunk.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig

from avl_fx import AVLCache, Plan
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import DOORS, decoder_graphs, decoder_sites, largest, through
from tests.oracle import avl_oracle, lazy_oracle
from tests.zoo._base import BOS, DECODER, IMAGE, PAD, build
from tests.zoo._run import prefill_and_decode

CHUNK, TOKENS, SIDE = 16, 4, 32
KINDS = ("chunked", "chunked", "chunked", "full")
PREFIX = "language_model.model.layers"
STEPS = 10
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def model():
    text = Llama4TextConfig(
        **DECODER,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=2,
        interleave_moe_layer_step=1,
        attention_chunk_size=CHUNK,
        layer_types=[f"{kind}_attention" for kind in KINDS],
    )
    vision = Llama4VisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        vision_output_dim=32,
        image_size=SIDE,
        patch_size=8,
        projector_input_dim=32,
        projector_output_dim=32,
    )
    config = Llama4Config(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return build(Llama4ForConditionalGeneration, config, "sdpa", torch.float32, 0)


def inputs(length, batch=2):
    """Prompts of ``length`` tokens with an image each; the second one is padded on the left."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for padding in range(batch):
        words = torch.randint(10, 60, (length - padding - 4 - TOKENS,), generator=generator).tolist()
        rows.append([PAD] * padding + [BOS, *words[:2], *[IMAGE] * TOKENS, 9, 8, 7, *words[2:]])
    ids = torch.tensor(rows)
    pixels = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}


def cache_of(name, model, plan):
    return AVLCache(plan, model.config) if name == "compact" else name


@pytest.mark.parametrize(
    ("cache", "door"),
    rest_in_matrix([*itertools.product(("dynamic", "static"), DOORS)], [("static", DOORS[1])], apart=True),
)
def test_identity_equals_eager(model, cache, door):
    given = inputs(15)
    expected = prefill_and_decode(model, given, cache, STEPS)
    with through(door, model, plan=Plan.identity(), compiler="eager"):
        found = prefill_and_decode(model, given, cache, STEPS, tokens=expected.tokens)
    assert largest(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("text", "cache", "length"),
    rest_in_matrix(
        [*itertools.product((None, 0.5), ("dynamic", "static", "compact"), (14, 24))],
        [(0.5, "static", 24)],
        apart=True,
    ),
)
def test_only_full_layers_are_partitioned(model, cache, length, text):
    """A text window must not follow the full layer's tokens into the shorter buffers of the others."""
    given = inputs(length)
    plan = Plan.avl(0.3, 0.5, 3, text=text, text_minimum=4)
    kind = "dynamic" if cache == "compact" else cache
    eager = prefill_and_decode(model, given, kind, STEPS)
    settings = {"core": 0.3, "secondary": 0.5, "refresh": 3, "text": text or 1.0, "minimum": 4}
    with avl_oracle(model, given["input_ids"] == IMAGE, decoder_prefix=PREFIX, kinds=KINDS, **settings):
        expected = prefill_and_decode(model, given, kind, STEPS, tokens=eager.tokens)
    with through("avl_fx.compile", model, plan=plan, compiler="eager") as recorder:
        found = prefill_and_decode(model, given, cache_of(cache, model, plan), STEPS, tokens=eager.tokens)
    assert largest(found, expected) < TOLERANCE
    assert largest(expected, eager) > 100 * TOLERANCE, "the plan changes what the model says"
    sites = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph)]
    assert {site.kind for site in sites} == set(KINDS)
    assert all(("partitioned" in site.action) == (site.kind == "full") for site in sites)


@pytest.mark.parametrize(
    "length", [pytest.param(8, marks=pytest.mark.matrix, id="a chunk"), pytest.param(24, id="more than a chunk")]
)
def test_no_layer_inherits_from_another_kind(model, length):
    """However short the prompt is: then neither layer has a mask that would tell."""
    given = inputs(length, batch=1)
    eager = prefill_and_decode(model, given, "dynamic", 4)
    with lazy_oracle(model, [(1, 3)], kinds=KINDS, decoder_prefix=PREFIX):
        expected = prefill_and_decode(model, given, "dynamic", 4, tokens=eager.tokens)
    with through("avl_fx.compile", model, plan=Plan.lazy([(1, 3)]), compiler="eager"):
        found = prefill_and_decode(model, given, "dynamic", 4, tokens=eager.tokens)
    assert largest(found, expected) < TOLERANCE
    assert largest(expected, eager) > 100 * TOLERANCE
