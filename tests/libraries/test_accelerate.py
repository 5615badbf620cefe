"""accelerate's hooks keep Dynamo out of every module: the identity plan stays exact, a lossy one is refused by name."""

import pytest

from avl_fx.errors import CaptureError
from tests.e2e._doors import FLOAT32_TOLERANCE, largest
from tests.libraries._plans import run

pytestmark = pytest.mark.libraries


def hooked(model):
    from accelerate import dispatch_model

    return dispatch_model(model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)


def test_the_identity_plan_stays_exact():
    assert largest(run(hooked, "identity"), run(lambda model: model, "identity")) < FLOAT32_TOLERANCE


def test_a_plan_that_drops_keys_says_what_is_in_its_way():
    with pytest.raises(CaptureError, match="accelerate"):
        run(hooked, "gla")
