"""A DynamicCache that grows in place, behind a model: exact, not recompiled, and never where somebody else looks."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache

from avl_fx import Plan, growing
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

GROWING = ["llava", "qwen2_5_vl", "gemma3", "mistral3"]
"""Full attention everywhere, positions in three dimensions, sliding layers among full ones, grouped heads."""
EACH = [*zip(GROWING, itertools.cycle(DOORS), strict=False)]
TEXT_WINDOW = Plan.avl(0.3, 0.5, 2, text=0.3, text_minimum=2)


def appends(recorder):
    return [p.count for g in recorder.graphs for p in g.passes if p.name == "append_in_place" and p.count]


@pytest.fixture
def claims(monkeypatch):
    """How often a row was stored, and how often its cache had to be copied first."""
    seen, real = {"stored": 0, "copied": 0}, growing.claim

    def claim(view):
        claimed = real(view)
        seen["stored"] += 1
        seen["copied"] += claimed is not view
        return claimed

    monkeypatch.setattr(growing, "claim", claim)
    return seen


@pytest.mark.parametrize(("name", "door"), rest_in_matrix(EACH, EACH[1:2], apart=True))
def test_steps_store_their_row_and_copy_nothing(name, door, claims):
    zoo = ZOO[name]
    model = zoo.make("sdpa")
    inputs = zoo.inputs(model, batch=2)
    eager = prefill_and_decode(model, inputs, "dynamic", steps=6)
    with through(door, model, compiler="eager") as recorder:
        compiled = prefill_and_decode(model, inputs, "dynamic", steps=6, tokens=eager.tokens)
    assert largest(compiled, eager) <= FLOAT32_TOLERANCE
    full = zoo.attention_kinds.count("full")
    assert appends(recorder) == [full, full]  # the first decode step, and all after it
    assert claims == {"stored": 2 * full * 6, "copied": 0}


@pytest.mark.parametrize(
    "plan", [None, pytest.param(Plan.lazy([(0, 1), (2, 3)]), marks=pytest.mark.matrix)], ids=["identity", "lazy"]
)
def test_a_long_answer_outgrows_its_buffer_without_a_recompile(plan, monkeypatch):
    monkeypatch.setattr(growing, "SPARE_ROWS", 8)
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    with through("torch.compile", model, compiler="eager", plan=plan):
        expected = prefill_and_decode(model, inputs, "static", steps=150)
    with through("torch.compile", model, compiler="eager", plan=plan) as recorder:
        run = prefill_and_decode(model, inputs, "dynamic", steps=150, tokens=expected.tokens)
    assert largest(run, expected) <= FLOAT32_TOLERANCE
    decode = [g for g in decoder_graphs(recorder) if decoder_sites(g)[0].queries == 1]
    assert len(decode) == 2  # the first step, and all others, whatever their buffer


def prompted(model, inputs):
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache


def step(model, inputs, cache, token):
    batch, length = inputs["input_ids"].shape[0], cache.get_seq_length() + 1
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch, length, dtype=torch.long)], 1)[:, :length]
    with torch.no_grad():
        return model(
            input_ids=torch.full((batch, 1), token), attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits


def forked(cache):
    """Another cache that shows the very same tensors."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@pytest.mark.parametrize(
    ("fork", "plan"),
    [
        pytest.param(forked, None, id="identity-shared tensors"),
        pytest.param(copy.deepcopy, None, id="identity-deep copy", marks=pytest.mark.matrix),
        pytest.param(forked, TEXT_WINDOW, id="text window-shared tensors", marks=pytest.mark.matrix),
        pytest.param(copy.deepcopy, TEXT_WINDOW, id="text window-deep copy", marks=pytest.mark.matrix),
    ],
)
def test_two_answers_to_one_prompt(fork, plan):
    """Neither continuation sees a row of the other, whatever a plan moves."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)

    def both(apart=False):
        one = prompted(model, inputs)
        other = prompted(model, inputs) if apart else fork(one)
        turns = [*itertools.product(range(20, 26), (one, other)), (30, one), (31, other), (32, one), (33, other)]
        return [step(model, inputs, cache, token) for token, cache in turns]

    dense = both()
    with through("torch.compile", model, compiler="eager", plan=plan) as recorder:
        answers = both()
    assert bool(appends(recorder)) == (plan is None)
    if plan is None:
        assert largest(answers, dense) <= FLOAT32_TOLERANCE
        return
    with through("torch.compile", model, compiler="eager", plan=plan):
        alone = both(apart=True)  # each on a cache that nobody else has
    assert largest(answers[0::2], alone[0::2]) <= FLOAT32_TOLERANCE
    # Of shared tensors whoever goes on first has the state; the other has none, and is dense. A deep copy has its own.
    expected = alone if fork is copy.deepcopy else dense
    assert largest(answers[1::2], expected[1::2]) <= FLOAT32_TOLERANCE


def test_crop_and_go_on():
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)

    def run():
        cache = prompted(model, inputs)
        logits = [step(model, inputs, cache, token) for token in (20, 21, 22)]
        cache.crop(-2)
        return logits + [step(model, inputs, cache, token) for token in (23, 24, 25)]

    expected = run()
    with through("torch.compile", model, compiler="eager") as recorder:
        answers = run()
    assert largest(answers, expected) <= FLOAT32_TOLERANCE
    assert appends(recorder)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"do_sample": True, "top_k": 20}],
    ids=["beams", "sampling"],
)
def test_generate_gives_the_same_tokens(how):
    """Beams reorder their cache at each step: that copies anyway, and leaves no room."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, **how}

    def run():
        torch.manual_seed(0)
        return model.generate(**inputs, **settings)

    expected = run()
    with through("torch.compile", model, compiler="eager") as recorder:
        assert torch.equal(run(), expected)
    assert bool(appends(recorder)) == ("num_beams" not in how)


def test_a_cache_from_elsewhere_gets_room_once_it_comes_back(claims):
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    expected = prompted(model, inputs)
    cache = copy.deepcopy(expected)
    plain = [step(model, inputs, expected, token) for token in range(20, 26)]
    with through("torch.compile", model, compiler="eager") as recorder:
        answers = [step(model, inputs, cache, token) for token in range(20, 26)]
    assert largest(answers, plain) <= FLOAT32_TOLERANCE
    assert appends(recorder) == [4]
    assert claims == {"stored": 2 * 4 * 4, "copied": 0}  # all steps but the first two


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_a_cache_without_room_meets_a_graph_of_its_own(compiler):
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)

    def run():
        cache = prompted(model, inputs)
        logits = [step(model, inputs, cache, token) for token in (20, 21, 22)]
        for _ in range(2):
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
            logits.append(step(model, inputs, cache, 23))
        return logits

    expected = run()
    with through("torch.compile", model, compiler=compiler) as recorder:
        answers = run()
    assert largest(answers, expected) <= FLOAT32_TOLERANCE
    decode = [g for g in decoder_graphs(recorder) if decoder_sites(g)[0].queries == 1]
    assert [any(p.name == "append_in_place" and p.count for p in g.passes) for g in decode] == [True, True, False]


def test_training_keeps_the_copy():
    """Gradients flow through the cache: nothing is written behind a tensor that autograd knows."""
    zoo = ZOO["llava"]
    model = zoo.make().requires_grad_(True)
    inputs = zoo.inputs(model, batch=2)

    def loss():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache, use_cache=True)
        token = torch.full((2, 1), 20)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        out = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        model.zero_grad()
        out.square().mean().backward()
        return model.get_submodule(zoo.decoder_prefix)[0].self_attn.k_proj.weight.grad.clone()

    expected = loss()
    with through("torch.compile", model, compiler="eager") as recorder:
        got = loss()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert not appends(recorder)
