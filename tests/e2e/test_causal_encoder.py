"""Vision encoders that attend causally (DeepSeek-OCR 2's): no plan is about them, by either front door."""

import json

import pytest
import torch

import avl_fx
from avl_fx import Plan
from avl_fx.passes.site import Status
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_sites, largest, through
from tests.oracle import lazy_oracle
from tests.zoo import ZOO
from tests.zoo._base import VISION

LLAVA = ZOO["llava"]
LAZY = [(1, 3)]
TOWER = "vision_tower"


def made():
    model = LLAVA.make()
    for module in model.model.vision_tower.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    return model


def roles(recorder):
    """Role -> whether the sites that have it are the tower's."""
    sites = [site for graph in recorder.graphs for site in graph.sites]
    return {site.role: TOWER in site.module_path or site.tower.startswith("encoder") for site in sites}


@pytest.mark.parametrize("door", DOORS)
def test_a_plan_is_about_the_decoder_alone(door):
    """The tower has two layers, the plan speaks of four: taken for a decoder, it would be an error."""
    model = made()
    inputs = LLAVA.inputs(model, batch=2)
    with torch.no_grad():
        with lazy_oracle(model, LAZY, LLAVA.decoder_prefix):
            expected = model(**inputs).logits[:, -1]
        # Not by `generate`, which encodes images before it calls what was compiled.
        with through(door, model, compiler="eager", plan=Plan.lazy(LAZY, num_layers=4)) as recorder:
            got = model(**inputs).logits[:, -1]
    assert largest([got], [expected]) < FLOAT32_TOLERANCE
    assert roles(recorder) == {"encoder": True, "decoder": False}
    lazy = [s.status for g in recorder.graphs for s in decoder_sites(g) if s.layer in (2, 3)]
    assert lazy
    assert set(lazy) == {Status.REWRITTEN}


def test_the_tower_is_causal_in_this_test():
    """Else the tests above say nothing."""
    model, plain = made(), LLAVA.make()
    inputs = LLAVA.inputs(model, batch=1)
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-3)


def test_explain_calls_it_an_encoder():
    report = avl_fx.explain(made(), front_door="avl_fx.compile", compiler="eager", **LLAVA.inputs(made(), batch=1))
    depths = {tower.role: len(tower.layers) for tower in report.towers}
    assert depths == {"encoder": VISION["num_hidden_layers"], "decoder": LLAVA.decoder_layers}


def test_calibration_compares_layers_of_the_decoder(tmp_path):
    model = made()
    plan = avl_fx.calibrate(model, [LLAVA.inputs(model, batch=2)], lazy_share=0.25, report=tmp_path, progress=False)
    assert plan.num_layers == LLAVA.decoder_layers
    report = json.loads((tmp_path / "report.json").read_text())
    assert [layer["layer"] for layer in report["layers"]] == list(range(LLAVA.decoder_layers))


def test_a_tower_past_its_recompile_limit_runs_eagerly(monkeypatch):
    """Which is exact, whatever the plan leaves out in the decoder."""
    monkeypatch.setattr("avl_fx.regions.RECOMPILE_LIMIT", 1)
    model = made()
    tower = model.model.vision_tower
    images = [torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3)]
    limited = torch._dynamo.config.patch(recompile_limit=1)
    with torch.no_grad(), limited:
        expected = [tower(image).last_hidden_state for image in images]
        with through("avl_fx.compile", model, plan=Plan.avl(), compiler="eager", dynamic=False) as recorder:
            got = [tower(image).last_hidden_state for image in images]
    assert len(recorder.graphs) == 1
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
