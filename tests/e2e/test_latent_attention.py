"""A LLaVA whose decoder is DeepSeek-V3's: caches hold latents and rotated keys, and decode steps read them as they lie.

Oracles expand them, as the stock model does.
"""

import pytest
import torch
from transformers import CLIPVisionConfig, DeepseekV3Config, DynamicCache, LlavaConfig, LlavaForConditionalGeneration

import avl_fx
from avl_fx import AVLCache, Plan
from avl_fx.passes.site import Reason
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.e2e.test_avl import converse
from tests.oracle import avl_oracle, lazy_oracle
from tests.zoo import ZOO
from tests.zoo._base import DECODER, IMAGE, VISION, build
from tests.zoo._run import prefill_and_decode
from tests.zoo.llava import PATCH, SIDE, TOKENS

LLAVA = ZOO["llava"]
LAYERS, RANK, ROPE = 4, 24, 8
SHARES = {"core": 0.3, "secondary": 0.5, "refresh": 3}
CACHES = ("dynamic", "static", "compact")


def make(dtype=torch.float32):
    text = DeepseekV3Config(
        **{**DECODER, "num_key_value_heads": DECODER["num_attention_heads"]},
        first_k_dense_replace=LAYERS,
        kv_lora_rank=RANK,
        q_lora_rank=None,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=16,
        v_head_dim=12,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
    )
    return build(LlavaForConditionalGeneration, config, "sdpa", dtype, 0)


def cache_of(kind, plan, model):
    return AVLCache(plan, model.config) if kind == "compact" else kind


def steps(recorder):
    """The decoder's sites of graphs with one query."""
    sites = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph) if site.queries == 1]
    assert sites
    return sites


@pytest.mark.parametrize(
    ("cache", "door"),
    [
        ("dynamic", "avl_fx.compile"),
        pytest.param("static", "torch.compile", marks=pytest.mark.matrix),
        pytest.param("static", "avl_fx.compile", marks=pytest.mark.matrix),
        pytest.param("dynamic", "torch.compile", marks=pytest.mark.matrix),
    ],
)
def test_identity_equals_eager_through_inductor(cache, door):
    model = make()
    inputs = LLAVA.inputs(model, batch=3)
    expected = prefill_and_decode(model, inputs, cache, steps=6)
    with through(door, model) as recorder:
        found = prefill_and_decode(model, inputs, cache, steps=6, tokens=expected.tokens)
    assert largest(found, expected) <= FLOAT32_TOLERANCE
    assert {(s.latent, s.kv_heads, s.head_dim, s.value_dim, s.cache) for s in steps(recorder)} == {
        (True, 1, RANK + ROPE, RANK, cache)
    }


@pytest.mark.parametrize(
    ("cache", "batch", "text"),
    [
        ("static", 3, 0.5),
        ("compact", 3, 0.5),
        pytest.param("dynamic", 3, None, marks=pytest.mark.matrix),
        pytest.param("dynamic", 1, 0.5, marks=pytest.mark.matrix),
        pytest.param("static", 1, None, marks=pytest.mark.matrix),
        pytest.param("compact", 1, None, marks=pytest.mark.matrix),
    ],
)
def test_partitioned_equals_oracle(cache, batch, text):
    model = make()
    inputs = LLAVA.inputs(model, batch=batch)
    visual = LLAVA.visual_positions(model, inputs)
    stock = "dynamic" if cache == "compact" else cache
    dense = prefill_and_decode(model, inputs, stock, steps=8)
    with avl_oracle(model, visual, **SHARES, text=text or 1.0, minimum=4):
        expected = prefill_and_decode(model, inputs, stock, steps=8, tokens=dense.tokens)
    plan = Plan.avl(**SHARES, text=text, text_minimum=4)
    with through("avl_fx.compile", model, compiler="eager", plan=plan) as recorder:
        found = prefill_and_decode(model, inputs, cache_of(cache, plan, model), steps=8, tokens=dense.tokens)
    assert largest(found, expected) <= FLOAT32_TOLERANCE
    assert largest(expected, dense) > 10 * FLOAT32_TOLERANCE
    assert all(site.latent and "partitioned" in site.action for site in steps(recorder))


@pytest.mark.matrix
def test_all_heads_share_one_ranking():
    """There is one head of latents, whatever the plan asks for."""
    model = make()
    inputs = LLAVA.inputs(model, batch=1)
    plans = [Plan.avl(**SHARES, text=None, scores=scores) for scores in ("shared", "per_kv_head")]
    runs, tokens = [], None
    for plan in plans:
        with through("avl_fx.compile", model, compiler="eager", plan=plan):
            runs.append(prefill_and_decode(model, inputs, "dynamic", steps=4, tokens=tokens))
        tokens = runs[0].tokens
    assert largest(*runs) <= FLOAT32_TOLERANCE


def test_a_compact_cache_stores_fewer_latents():
    """Through Inductor, and both tensors of a layer have the same rows."""
    model = make()
    inputs = LLAVA.inputs(model, batch=1)
    count = int(LLAVA.visual_positions(model, inputs).sum())
    plan = Plan.avl(**SHARES, text=None)
    cache = AVLCache(plan, model.config)
    with through("avl_fx.compile", model, plan=plan):
        prefill_and_decode(model, inputs, cache, steps=4)
    rows = inputs["input_ids"].shape[1] - count + int(SHARES["secondary"] * count) + 4
    for layer in cache.layers:
        assert (layer.keys.shape, layer.values.shape) == ((1, 1, rows, RANK), (1, 1, rows, ROPE))


@pytest.mark.matrix
@pytest.mark.parametrize("text", [None, 0.5])
def test_a_second_turn_on_a_compact_cache(text):
    """A prompt of many queries over fewer rows than the model believes in: there is nothing to expand."""
    model = make()
    turns = [LLAVA.inputs(model, batch=1, seed=seed) for seed in (0, 1)]
    seen = [LLAVA.visual_positions(model, inputs) for inputs in turns]
    both = torch.cat([seen[0], torch.zeros(1, 5, dtype=torch.bool), seen[1]], 1)
    plan = Plan.avl(**SHARES, text=text, text_minimum=3)
    with avl_oracle(model, both, compact=True, **SHARES, text=text or 1.0, minimum=3):
        expected, tokens = converse(model, turns, DynamicCache(config=model.config.get_text_config()))
    with through("avl_fx.compile", model, compiler="eager", plan=plan):
        found, chosen = converse(model, turns, AVLCache(plan, model.config))
    assert torch.equal(chosen, tokens)
    assert largest(found, expected) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("how", rest_in_matrix(["beams", "assisted", "pieces"], ["assisted"]))
@pytest.mark.parametrize("cache", ["compact", pytest.param("dynamic", marks=pytest.mark.matrix)])
def test_other_ways_to_generate(cache, how):
    """One visual key in a hundred is left out, and tokens are those of the stock model."""
    model = make()
    inputs = LLAVA.inputs(model, batch=1)
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    options |= {"beams": {"num_beams": 3}, "assisted": {"prompt_lookup_num_tokens": 3}}.get(
        how, {"prefill_chunk_size": 9}
    )
    if how == "pieces":
        inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
        inputs["input_ids"] = inputs["input_ids"].clamp(max=IMAGE - 1)
    expected = model.generate(**inputs, **options)
    plan = Plan.avl(core=0.99, secondary=1.0, refresh=0, text=None)
    past = AVLCache(plan, model.config) if cache == "compact" else DynamicCache(config=model.config.get_text_config())
    with through("avl_fx.compile", model, compiler="eager", plan=plan):
        assert torch.equal(model.generate(**inputs, **options, past_key_values=past), expected)


@pytest.mark.parametrize("cache", rest_in_matrix(["dynamic", "static", "compact"], ["compact"]))
def test_lazy_layers_equal_oracle(cache):
    """They make values of latents of their own, and a cache keeps all of these."""
    model = make()
    inputs = LLAVA.inputs(model, batch=3)
    stock = "dynamic" if cache == "compact" else cache
    dense = prefill_and_decode(model, inputs, stock, steps=5)
    plan = Plan.lazy([(1, 3)])
    with lazy_oracle(model, [(1, 3)], LLAVA.decoder_prefix, LLAVA.attention_kinds, "gla"):
        expected = prefill_and_decode(model, inputs, stock, steps=5, tokens=dense.tokens)
    with through("avl_fx.compile", model, compiler="eager", plan=plan) as recorder:
        found = prefill_and_decode(model, inputs, cache_of(cache, plan, model), steps=5, tokens=dense.tokens)
    assert largest(found, expected) <= FLOAT32_TOLERANCE
    assert {site.anchor for site in steps(recorder) if site.layer > 1} == {1}


def test_lazy_layers_in_a_second_turn():
    model = make()
    turns = [LLAVA.inputs(model, batch=1, seed=seed) for seed in (0, 1)]
    text = model.config.get_text_config()
    with lazy_oracle(model, [(1, 3)], LLAVA.decoder_prefix, LLAVA.attention_kinds, "gla"):
        expected, tokens = converse(model, turns, DynamicCache(config=text), steps=3)
    with through("avl_fx.compile", model, compiler="eager", plan=Plan.lazy([(1, 3)])) as recorder:
        found, chosen = converse(model, turns, DynamicCache(config=text), steps=3)
    assert torch.equal(chosen, tokens)
    assert largest(found, expected) <= FLOAT32_TOLERANCE
    sites = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph)]
    assert any(site.queries not in (1, site.keys) for site in sites), "a prompt over a cache was compiled"
    assert {site.anchor for site in sites if site.layer > 1} == {1}


def test_a_lazy_block_of_latents_is_not_partitioned():
    model = make()
    inputs = LLAVA.inputs(model, batch=1)
    plan = Plan.avl(**SHARES, text=None).combine(Plan.lazy([(2, 3)]))
    dense = prefill_and_decode(model, inputs, "dynamic", steps=5)
    visual = LLAVA.visual_positions(model, inputs)
    with avl_oracle(model, visual, **SHARES, text=1.0, blocks=[(2, 3)], kinds=["full", "full", "sliding", "sliding"]):
        expected = prefill_and_decode(model, inputs, "dynamic", steps=5, tokens=dense.tokens)
    with through("avl_fx.compile", model, compiler="eager", plan=plan) as recorder:
        found = prefill_and_decode(model, inputs, "dynamic", steps=5, tokens=dense.tokens)
    assert largest(found, expected) <= FLOAT32_TOLERANCE
    refused = {site.layer: (site.reason, site.detail) for site in steps(recorder) if site.reason}
    assert refused == dict.fromkeys((2, 3), (Reason.NOT_THE_CACHE, "latents in a lazy block"))


def test_half_precision_is_as_near_as_eager():
    model, exact = make(torch.bfloat16), make()
    inputs = LLAVA.inputs(model, batch=2)
    truth = prefill_and_decode(exact, LLAVA.inputs(exact, batch=2), "dynamic", steps=4)
    eager = prefill_and_decode(model, inputs, "dynamic", steps=4, tokens=truth.tokens)
    with through("avl_fx.compile", model, compiler="eager"):
        found = prefill_and_decode(model, inputs, "dynamic", steps=4, tokens=truth.tokens)
    assert largest(found, truth) <= 1.5 * largest(eager, truth)


def test_explain_says_what_a_step_reads():
    model = make()
    inputs = LLAVA.inputs(model, batch=1)
    report = avl_fx.explain(model, Plan.avl(**SHARES, text=None), compiler="eager", **inputs)
    assert "dynamic, latents" in str(report)
    reads = report.decode_reads
    assert reads.layers[0].costs.dense.kv_bytes == reads.keys * (RANK + ROPE) * 4
