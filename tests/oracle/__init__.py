"""Independent oracles: what a rewrite must equal, in plain eager PyTorch, with nothing of avl_fx in it."""

from tests.oracle.lazy import LazyOracle, lazy_oracle

__all__ = ["LazyOracle", "lazy_oracle"]
