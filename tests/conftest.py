"""Set-up of the tests."""

import ctypes
import gc
import logging
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
import torch._dynamo.guards
import torch._inductor.config

# Dynamo's structured trace is meant for a file. It is written where its logger has a handler, and pytest gives its own
# to every logger that does not propagate: every graph would be printed and kept.
logging.getLogger("torch.__trace").propagate = True

# Half of the time of Inductor's C++ kernels goes into linking them with libraries that have long been loaded. What they
# need of those (its vector functions, which ones depends on the processor) they find where it is open to all.
torch._inductor.config.aot_inductor.link_libtorch = False
for _library in sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*")):
    ctypes.CDLL(str(_library), mode=ctypes.RTLD_GLOBAL)

# Behind each graph Dynamo times its guards (with a cold cache: it writes over megabytes first), collects garbage, and
# writes down who changed which object: a tenth of the time of these tests, whose graphs are small, and nobody reads it.
torch._dynamo.guards.profile_guard_manager = lambda *guards_locals_times: 0.0
torch._dynamo.config.run_gc_after_compile = False
if hasattr(torch._dynamo.config, "side_effect_replay_policy"):
    torch._dynamo.config.side_effect_replay_policy = "silent"


FROZEN_EVERY = 8
"""Tests from one freeze to the next."""
_run_since = 0


def pytest_collection_finish():
    """Everything imported so far stays. Dynamo collects garbage at each reset, and would go over all of it.

    It also makes objects by the million, hardly any of them in cycles: looking for these less often saves a tenth.
    """
    _freeze()
    gc.set_threshold(200_000, 20, 100)


def pytest_runtest_teardown(item, nextitem):
    """What a test leaves behind stays, too: caches of Dynamo, Inductor and sympy grow to millions of objects."""
    global _run_since
    _run_since += 1
    if _run_since >= FROZEN_EVERY:
        _run_since = 0
        _freeze()


def _freeze():
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def recompile_limit_as_it_was():
    """Examples and benchmarks raise the limit for the thread that asks, and other tests tell what it is."""
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield


@pytest.fixture
def short_caches_too(monkeypatch):
    """`read_once` takes every decode step, also over the short caches of tests, which it leaves to ATen."""
    from avl_fx.passes import read_once

    monkeypatch.setattr(read_once, "MIN_PRODUCTS", dict.fromkeys(read_once.MIN_PRODUCTS, 0))


@pytest.fixture
def one_thread():
    """Compute on a single thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
