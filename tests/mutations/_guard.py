"""Pytest plugin of a mutation run: the tests must import the mutated copy, not the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure() -> None:
    import avl_fx
    import avl_fx.kernels
    import avl_fx.passes

    root = Path(os.environ["AVL_FX_MUTANT"]).resolve()
    for module in (avl_fx, avl_fx.passes, avl_fx.kernels):
        if not Path(str(module.__file__)).resolve().is_relative_to(root):
            raise pytest.UsageError(
                f"{module.__name__} comes from {module.__file__}, not from the mutated copy in {root}"
            )
