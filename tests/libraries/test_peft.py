"""LoRA adapters: a `PeftModel` under a plan equals the model that they are merged into, switched off the bare one."""

import pytest
import torch

import avl_fx
from tests.e2e._doors import largest
from tests.libraries._plans import CASES, PROJECTIONS, run

pytestmark = pytest.mark.libraries
TOLERANCE = 1e-3
"""Merging adds two products up in another order."""


def adapted(model):
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def merged(model):
    return adapted(model).merge_and_unload()


@pytest.mark.parametrize("case", CASES)
def test_adapters_equal_the_merged_model(case):
    expected, bare = run(merged, case), run(lambda model: model, case)
    assert largest(run(adapted, case), expected) < TOLERANCE
    assert largest(expected, bare) > 100 * TOLERANCE, "the adapters matter"


@pytest.mark.parametrize("case", ["gla", "avl"])
def test_adapters_that_are_switched_off(case):
    def off(model):
        model = adapted(model)
        model.base_model.disable_adapter_layers()
        return model

    assert largest(run(off, case), run(lambda model: model, case)) < TOLERANCE


def test_adapters_on_the_base_model_are_found_by_explain():
    from tests.zoo import ZOO

    zoo = ZOO["llava"]
    model = adapted(zoo.make())
    plan, _ = CASES["avl"]
    report = avl_fx.explain(model, plan, front_door="avl_fx.compile", **zoo.inputs(model, batch=3))
    assert [forward.phase for forward in report.forwards] == ["prefill", "decode", "decode"]
    assert report.decode_reads is not None
