"""Set-up of the tests."""

import logging

import pytest

# Dynamo's structured trace is meant for a file; pytest would keep every record of every graph.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture
def short_caches_too(monkeypatch):
    """`read_once` takes every decode step, also over the short caches of tests, for which ATen is faster."""
    from avl_fx.passes import read_once

    monkeypatch.setattr(read_once, "MIN_PRODUCTS", dict.fromkeys(read_once.MIN_PRODUCTS, 0))
