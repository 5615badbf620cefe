"""When a pass fails, the graph runs as the model wrote it, unless its cache lacks keys: then the call is an error."""

import pytest

import avl_fx.backend
from avl_fx import Plan
from avl_fx.errors import CacheStateError
from avl_fx.passes.pipeline import run_stages
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, largest, through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS = 3
WAYS = [(door, cache) for door in DOORS for cache in ("dynamic", "static")]


@pytest.fixture
def broken_in_decode(monkeypatch):
    """All passes of graphs behind the prompt's fail."""
    done = []

    def run(gm, ctx):
        results = run_stages(gm, ctx)
        if any(site.role == "decoder" and site.queries == 1 for site in ctx.sites):
            done.append(gm)
            raise ValueError("a pass is broken")
        return results

    monkeypatch.setattr(avl_fx.backend, "run_stages", run)
    return done


@pytest.mark.parametrize(("door", "cache"), rest_in_matrix(WAYS, WAYS[:1], apart=True))
def test_keys_that_are_missing_are_named(broken_in_decode, door, cache):
    zoo = ZOO["llava"]
    model = zoo.make()
    with (
        through(door, model, compiler="eager", strict=False, plan=Plan.lazy([(0, 2)])),
        pytest.raises(CacheStateError, match="a decoder layer is about to attend to keys that a lazy plan did not"),
    ):
        prefill_and_decode(model, zoo.inputs(model, batch=2), cache, steps=STEPS)
    assert broken_in_decode


@pytest.mark.parametrize("cache", rest_in_matrix(["dynamic", "static"], ["static"]))
def test_a_complete_cache_goes_on(broken_in_decode, cache):
    """Its rows have been reordered for the plan; dense steps put them back."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    expected = prefill_and_decode(model, inputs, cache, steps=STEPS)
    plan = Plan.avl(0.3, 0.5, 3)
    with through("avl_fx.compile", model, compiler="eager", strict=False, plan=plan):
        got = prefill_and_decode(model, inputs, cache, steps=STEPS, tokens=expected.tokens)
    assert broken_in_decode
    assert largest(got, expected) < FLOAT32_TOLERANCE
