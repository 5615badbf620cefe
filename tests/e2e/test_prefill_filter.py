"""L1: a prompt that drops visual tokens on its way equals the independent eager oracle, and so do its decode steps.

Every model of the zoo with visual positions among its keys, on the cache that does not store what is dropped.
"""

import itertools

import pytest
import torch

import avl_fx
from avl_fx import AVLCache, Plan
from avl_fx.passes.site import Reason
from tests.e2e._covering import one_each
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.e2e.test_avl import as_oracle
from tests.oracle import avl_oracle
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS = 8
PRESETS = {
    "paper": {"core": 0.3, "secondary": 0.5, "refresh": 3},
    "tight": {"core": 0.1, "secondary": 0.2, "refresh": 2, "scores": "per_kv_head"},
    "window": {"core": 0.25, "secondary": 0.4, "refresh": 3, "scoring_window": 4},
    "text": {"core": 0.3, "secondary": 0.5, "refresh": 3, "text": 0.5, "text_minimum": 4},
    "spread": {"core": 0.3, "secondary": 0.5, "refresh": 3, "spread": 0.5},
}
WHOLE = [n for n, zoo in ZOO.items() if set(zoo.attention_kinds) == {"full"} and n != "plain_lvlm"]
"""Models all of whose layers attend to everything."""
FACTORS = (WHOLE, (1, 3), tuple(PRESETS), ("dense", "gla", "vla", "vla_scores"))
CASES = list(itertools.product(*FACTORS))
CHOSEN = one_each(CASES)


def ids(case):
    return "-".join(map(str, case))


def check(name, batch, preset, layers, compiler="eager", keep=0.6, after=0, **kwargs):
    zoo, settings = ZOO[name], PRESETS[preset]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=batch)
    visual = zoo.visual_positions(model, inputs)
    # Features that enter layer by layer are added by position: the filter stands behind them.
    after = max(after, getattr(zoo, "deepstack", 0))
    blocks = [] if layers == "dense" else [(after + 1, zoo.decoder_layers - 1)]
    plan = Plan.avl(**{"text": None, **settings}, prefill=keep, prefill_after_layer=after)
    if blocks:
        plan = plan.combine(Plan.lazy(blocks, layers))
    dense = prefill_and_decode(model, inputs, "dynamic", steps=STEPS)
    oracle = {"blocks": blocks, "mode": "gla" if layers == "dense" else layers, "kinds": zoo.attention_kinds}
    shares = {**as_oracle(settings), "prefill": keep, "after": after}
    with avl_oracle(model, visual, decoder_prefix=zoo.decoder_prefix, **oracle, **shares):
        expected = prefill_and_decode(model, inputs, "dynamic", steps=STEPS, tokens=dense.tokens)
    with through("avl_fx.compile", model, compiler=compiler, plan=plan, **kwargs) as recorder:
        cache = AVLCache(plan, model.config)
        got = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=dense.tokens)
    prompt, *_ = decoder_graphs(recorder)
    for site in decoder_sites(prompt):
        assert site.action.endswith(f"on {keep:g} of the visual tokens") == (site.layer > after), site.action
    assert largest(got[:1], dense[:1]) > 10 * FLOAT32_TOLERANCE, "a filter that changes nothing proves nothing"
    assert largest(got, expected) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("case", CHOSEN, ids=ids)
def test_a_filtered_prompt_equals_the_oracle(case):
    check(*case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", sorted({*CASES} - {*CHOSEN}), ids=ids)
def test_a_filtered_prompt_equals_the_oracle_everywhere(case):
    check(*case)
