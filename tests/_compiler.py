"""When tests of the C++ kernels may be left out: only where there is no compiler, never because one does not build."""

import pytest

from avl_fx.kernels.native import compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


def skip_without_compiler() -> None:
    """For fixtures, which take no mark."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
