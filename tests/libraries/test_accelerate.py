"""accelerate's hooks keep Dynamo out of every module: answers stay exact, and that a plan did nothing is said."""

import pytest

from tests.e2e._doors import FLOAT32_TOLERANCE, largest
from tests.libraries._plans import run

pytestmark = pytest.mark.libraries


def hooked(model):
    from accelerate import dispatch_model

    return dispatch_model(model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)


def test_the_identity_plan_stays_exact():
    assert largest(run(hooked, "identity"), run(lambda model: model, "identity")) < FLOAT32_TOLERANCE


def test_a_plan_that_drops_keys_says_what_is_in_its_way(caplog):
    with caplog.at_level("WARNING", "avl_fx"):
        got = run(hooked, "gla")
    assert any("did nothing" in said and "accelerate" in said for said in caplog.messages)
    assert largest(got, run(lambda model: model, "identity")) < FLOAT32_TOLERANCE
