"""Nothing is kept: many answers in a row leave nothing behind, and a long one keeps its cache and no more.

A stock cache grows by the keys and values of each token, whatever the plan reads of it. What must not grow is all the
rest: the tensors that are alive, the objects of the runtime, the memory beyond the cache.
"""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from avl_fx import Plan, modality_hook, partition, regions
from avl_fx.modality import given
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import through
from tests.e2e._memory import BATCH, live_state, live_tensors, resident
from tests.zoo import ZOO

PLANS = {
    "identity": None,
    "text": Plan.avl(0.3, 0.5, 3, text=0.5, text_minimum=4),
    "lazy": Plan.avl(0.3, 0.5, 3, text=None).combine(Plan.lazy([(1, 3)])),
}
SLACK = 32 * 2**20
"""Bytes that an allocator may keep: far less than what any leak below would take."""
ROOT = Path(__file__).parents[2]


def generate(model, inputs, kind, tokens=4, **more):
    static = {"cache_implementation": "static"} if kind == "static" else {}
    return model.generate(**inputs, **static, **more, max_new_tokens=tokens, disable_compile=True)


def registries():
    """Sizes of everything that the package keeps for the whole process."""
    return {
        "models": len(regions._compiled),
        "ranges": partition._everything.cache_info().currsize,
        "forwards": len(modality_hook._open.get()),
        "given": given() is not None,
    }


def check_generates(door, kind, plan, count):
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    gc.collect()
    others = live_state()
    with through(door, model, compiler="eager", plan=PLANS[plan]) as recorder:
        for _ in range(3):  # what is made once: graphs, kernels, ranges
            generate(model, inputs, kind)
        before, known, graphs = live_tensors(), registries(), len(recorder.graphs)
        recorder.visual.clear()
        start = resident()
        for _ in range(count):
            generate(model, inputs, kind)
            recorder.visual.clear()  # the test's own
        assert live_tensors() - before == {}
        assert registries() == known
        assert len(recorder.graphs) == graphs
        assert resident() - start <= SLACK
    assert live_state() - others == {}
    assert registries()["models"] == known["models"] - (door == "avl_fx.compile")


@pytest.mark.parametrize(
    ("door", "kind", "plan"),
    [
        ("avl_fx.compile", "dynamic", "text"),
        pytest.param("torch.compile", "dynamic", "identity", marks=pytest.mark.matrix),
        pytest.param("avl_fx.compile", "static", "lazy", marks=pytest.mark.matrix),
    ],
)
def test_generates_leave_nothing_behind(door, kind, plan):
    check_generates(door, kind, plan, count=10)


@pytest.mark.slow
@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_thousand_generates_leave_nothing_behind(kind, plan):
    check_generates("avl_fx.compile", kind, plan, count=1000)


@pytest.mark.parametrize("plan", rest_in_matrix(["identity", "text", "lazy"], ["text"]))
def test_a_cache_goes_with_its_last_reference(plan):
    """Without waiting for the garbage collector: a cache is most of a model's working memory."""
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    with through("avl_fx.compile", model, compiler="eager", plan=PLANS[plan]):
        generate(model, inputs, "dynamic")
        gc.collect()
        gc.disable()
        try:
            others = live_state()
            out = generate(model, inputs, "dynamic", return_dict_in_generate=True)
            assert live_state() - others != {}
            del out
            assert live_state() - others == {}
        finally:
            gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_two_thousand_tokens_keep_their_cache_and_no_more(kind):
    command = [sys.executable, "-m", "tests.e2e._memory", kind, "2000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    early, late = report["seen"][1], report["seen"][-1]
    assert (early["token"], late["token"]) == (200, 2000)
    assert late["tensors"] == early["tensors"]
    assert late["state"] == early["state"] > 0
    # Keys and values in float32: 4 layers, 2 heads of 16.
    of_tokens = (late["token"] - early["token"]) * BATCH * 4 * 2 * 2 * 16 * 4
    # A dynamic cache exists twice while a step copies it; a static one is there from the start.
    growth = 2 * of_tokens if kind == "dynamic" else 0
    assert report["cache"] >= of_tokens
    assert late["resident"] - early["resident"] <= growth + SLACK
