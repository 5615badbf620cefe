"""Decoders of which some layers are convolutions (LFM2-VL): what has attention is counted, and nothing else."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import DynamicCache, Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration

import avl_fx
from avl_fx import AVLCache, Plan
from avl_fx.backend import warn_of_pieces
from avl_fx.errors import CacheStateError
from avl_fx.passes.site import Reason
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.oracle import avl_oracle
from tests.zoo._base import BOS, DECODER, IMAGE, VISION, build
from tests.zoo._run import prefill_and_decode

TYPES = ("conv", "full_attention", "conv", "full_attention")
TOKENS = 4
PREFIX = "model.language_model.layers"
SETTINGS = {"core": 0.3, "secondary": 0.5, "refresh": 3}


@pytest.fixture(scope="module")
def model():
    config = Lfm2VlConfig(
        vision_config={**VISION, "patch_size": 4, "num_patches": 64},
        text_config=Lfm2Config(**DECODER, layer_types=list(TYPES)),
        image_token_id=IMAGE,
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    return build(Lfm2VlForConditionalGeneration, config, "sdpa", torch.float32, 0)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(5)
    rows = [[BOS, *torch.randint(10, 60, (3,), generator=generator).tolist(), *[IMAGE] * TOKENS, 11, 12, 13]] * 2
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.ones(2, len(rows[0]), dtype=torch.long),
        "pixel_values": torch.randn(2, 16, 48, generator=generator),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
    }


def test_layers_with_attention_are_partitioned(model, inputs):
    expected = prefill_and_decode(model, inputs, "dynamic", 8)
    with avl_oracle(
        model, inputs["input_ids"] == IMAGE, decoder_prefix=PREFIX, kinds=["full"] * len(TYPES), text=1.0, **SETTINGS
    ):
        oracle = prefill_and_decode(model, inputs, "dynamic", 8, tokens=expected.tokens)
    with through("avl_fx.compile", model, plan=Plan.avl(**SETTINGS, text=None), compiler="eager"):
        found = prefill_and_decode(model, inputs, "dynamic", 8, tokens=expected.tokens)
    assert largest(found, oracle) <= FLOAT32_TOLERANCE
    assert largest(oracle, expected) > 10 * FLOAT32_TOLERANCE


def test_a_layer_without_attention_is_no_anchor_and_not_missing(model, inputs, caplog):
    warn_of_pieces.cache_clear()
    caplog.set_level(logging.WARNING, logger="avl_fx")
    expected = prefill_and_decode(model, inputs, "dynamic", 2)
    with through("avl_fx.compile", model, plan=Plan.lazy([(0, 3)]), compiler="eager") as recorder:
        found = prefill_and_decode(model, inputs, "dynamic", 2, tokens=expected.tokens)
    assert largest(found, expected) <= FLOAT32_TOLERANCE
    sites = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph)]
    assert {(s.layer, s.reason, s.detail) for s in sites} == {
        (1, Reason.ANCHOR_KIND, "layer 0 has no attention"),
        (3, Reason.ANCHOR_KIND, "layer 0 has no attention"),
    }
    assert "decoder layers" not in caplog.text


def test_explain_expects_layers_with_attention(model, inputs):
    report = avl_fx.explain(model, Plan.avl(**SETTINGS, text=None), compiler="eager", **inputs)
    assert report.decoder.expected == 2
    assert set(report.decoder.seen.values()) == {(1, 3)}
    assert "layers expected, " not in " ".join(report.advice)


@torch.no_grad()
def fed(model, inputs):
    """A compact cache of a plan that drops nothing, filled eagerly: what it copies must not depend on a graph."""
    cache = AVLCache(Plan(), model.config)
    model(**inputs, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def go_on(model, cache, tokens):
    return model(input_ids=torch.tensor(tokens)[:, None], past_key_values=cache, use_cache=True).logits


def test_a_copy_has_states_of_its_own(model, inputs):
    """Convolutions keep theirs in dictionaries, and write to them in place."""
    cache = fed(model, inputs)
    twin = copy.deepcopy(cache)
    assert torch.equal(go_on(model, cache, [20, 20]), go_on(model, twin, [20, 20]))


def test_beams(model, inputs):
    """Recurrent layers can be reordered, and nothing else."""
    mine, stock = fed(model, inputs), DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, past_key_values=stock, use_cache=True)
    for cache in (mine, stock):
        cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.allclose(go_on(model, mine, [20, 21]), go_on(model, stock, [20, 21]), atol=1e-5)


def test_what_a_layer_cannot_is_refused_and_leaves_the_cache_as_it_was(model, inputs):
    cache, plain = fed(model, inputs), fed(model, inputs)
    with pytest.raises(CacheStateError, match="batch_repeat_interleave"):
        cache.batch_repeat_interleave(2)
    assert torch.equal(go_on(model, cache, [20, 21]), go_on(model, plain, [20, 21]))
