"""Every way in which `generate` uses a stock cache: sampling, beams, assisted decoding, prompts in pieces.

Under the identity plan the answers are the eager model's. Under plans that partition the cache they are the oracle's as
long as the state of the cache is known, and the dense model's as soon as it is not.
"""

import itertools

import pytest
import torch
from transformers import DynamicCache

from avl_fx import Plan
from tests.e2e._covering import covering, one_each
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_graphs, largest, through
from tests.oracle import avl_oracle
from tests.zoo import ZOO

pytestmark = pytest.mark.matrix


MODELS = ("llava", "qwen2_5_vl", "gemma3")
"""Full attention everywhere, positions in three dimensions, sliding layers among full ones."""
NEW_TOKENS = 12
MODES = {
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "draft": {"assistant_model": 1, "num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant"},
    "draft sampling": {"assistant_model": 1, "do_sample": True, "num_assistant_tokens": 4},
    "self draft": {"assistant_model": 0, "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "chunks": {"prefill_chunk_size": 7},
}
"""Keyword arguments of `generate`; `assistant_model` is a seed, 0 that of the model itself."""
DRAFTS = ("draft", "draft sampling", "self draft", "lookup")


def generate(zoo, model, mode, cache="dynamic", batch=2, seed=7, steps=NEW_TOKENS, **more):
    """The output of `generate`, with the logits of every forward."""
    settings = dict(MODES[mode])
    if settings.get("assistant_model") is not None:
        settings["assistant_model"] = zoo.make(seed=settings["assistant_model"])
    if cache == "static":
        settings["cache_implementation"] = "static"
    # Stock assisted decoding takes one row only.
    inputs = zoo.inputs(model, batch=1 if mode in DRAFTS else batch)
    torch.manual_seed(seed)
    return model.generate(
        **inputs,
        **settings,
        **more,
        max_new_tokens=steps,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
    )


# ---- the identity plan -----------------------------------------------------------------------------------------------

FACTORS = (tuple(MODES), MODELS, DOORS, ("dynamic", "static"))


def _allowed(case):
    mode, name, _, cache = case
    # Stock transformers crops no static cache.
    return cache in ZOO[name].caches and not (cache == "static" and mode in DRAFTS)


CASES = list(filter(_allowed, itertools.product(*FACTORS)))
CHOSEN = one_each(CASES)
"""Each mode once, the other factors spread."""
COVERING = covering(FACTORS, _allowed)


def check_identity(mode, name, door, cache):
    zoo = ZOO[name]
    model = zoo.make()
    expected = generate(zoo, model, mode, cache)
    with through(door, model, compiler="eager") as recorder:
        got = generate(zoo, model, mode, cache)
    assert decoder_graphs(recorder)
    assert torch.equal(got.sequences, expected.sequences)
    assert largest(got.logits, expected.logits) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("case", CHOSEN, ids="-".join)
def test_identity_gives_the_eager_answer(case):
    check_identity(*case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", [c for c in COVERING if c not in CHOSEN], ids="-".join)
def test_identity_gives_the_eager_answer_in_pairs(case):
    check_identity(*case)


# ---- plans that partition the cache ----------------------------------------------------------------------------------

PARTITIONS = {
    "lossless": {"core": 0.1, "secondary": 1.0, "refresh": 2},
    "text": {"core": 0.1, "secondary": 0.3, "refresh": 2, "text": 0.3},
}


def plan_of(settings):
    return Plan.avl(**{"text": None, **settings}, text_minimum=2)


def oracle_of(model, visual, settings):
    return avl_oracle(model, visual, **{"text": 1.0, **settings}, minimum=2)


class Watched(DynamicCache):
    """Tells the oracle when rows were cut off: then nothing is known of the cache any more."""

    oracle = None

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.oracle is not None:
            self.oracle.lose(self.get_seq_length())
            self.oracle.cropped = True


@pytest.mark.parametrize(
    ("mode", "cache", "plan"),
    [
        ("sampling", "static", "text"),
        ("chunks", "dynamic", "text"),
        ("chunks", "static", "lossless"),
        pytest.param("sampling", "dynamic", "lossless", marks=pytest.mark.matrix),
        pytest.param("chunks", "dynamic", "lossless", marks=pytest.mark.matrix),
        pytest.param("chunks", "static", "text", marks=pytest.mark.matrix),
    ],
)
def test_a_partitioned_cache_gives_the_answer_of_the_oracle(mode, cache, plan):
    zoo, settings = ZOO["llava"], PARTITIONS[plan]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    repeats = MODES[mode].get("num_return_sequences", 1)
    visual = zoo.visual_positions(model, inputs).repeat_interleave(repeats, 0)
    dense = generate(zoo, model, mode, cache)
    with oracle_of(model, visual, settings):
        expected = generate(zoo, model, mode, cache)
    assert largest(expected.logits, dense.logits) > 10 * FLOAT32_TOLERANCE, "a plan that changes nothing proves nothing"
    for door in DOORS:
        with through(door, model, compiler="eager", plan=plan_of(settings)):
            got = generate(zoo, model, mode, cache)
        assert torch.equal(got.sequences, expected.sequences)
        assert largest(got.logits, expected.logits) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("mode", "plan"),
    [
        ("draft", "text"),
        ("lookup", "text"),
        pytest.param("self draft", "text", marks=pytest.mark.matrix),
        pytest.param("draft", "lossless", marks=pytest.mark.matrix),
        pytest.param("lookup", "lossless", marks=pytest.mark.matrix),
        pytest.param("draft sampling", "text", marks=pytest.mark.matrix),
    ],
)
def test_assisted_decoding_is_dense_once_candidates_were_rejected(mode, plan):
    """Verification is dense, and rejected rows are cut off, which leaves no state; before that the plan holds."""
    zoo, settings = ZOO["llava"], PARTITIONS[plan]
    model = zoo.make()
    visual = zoo.visual_positions(model, zoo.inputs(model, batch=1))

    def run(oracle=None):
        cache = Watched(config=model.config.get_text_config())
        cache.oracle = oracle
        return generate(zoo, model, mode, steps=20, past_key_values=cache)

    dense = run()
    with oracle_of(model, visual, settings) as oracle:
        oracle.cropped = False
        expected = run(oracle)
        assert oracle.cropped
    # Where each step drafts something, every step is a verification, hence dense.
    assert torch.equal(expected.sequences, dense.sequences) or mode == "lookup"
    for door in DOORS:
        with through(door, model, compiler="eager", plan=plan_of(settings)):
            got = run()
        assert torch.equal(got.sequences, expected.sequences)
        assert largest(got.logits, expected.logits) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(("cache", "plan"), [("dynamic", "text"), ("static", "lossless")])
@pytest.mark.parametrize("mode", ["beams", pytest.param("beam sampling", marks=pytest.mark.matrix)])
def test_beams_are_dense(mode, cache, plan):
    """They are reordered after every step: a copy has no state, and is exact."""
    zoo, settings = ZOO["llava"], PARTITIONS[plan]
    model = zoo.make()
    expected = generate(zoo, model, mode, cache)
    with through("avl_fx.compile", model, compiler="eager", plan=plan_of(settings)) as recorder:
        got = generate(zoo, model, mode, cache)
    assert any("partitioned" in s.action for g in decoder_graphs(recorder) for s in g.sites)
    assert torch.equal(got.sequences, expected.sequences)
    assert largest(got.logits, expected.logits) <= FLOAT32_TOLERANCE
