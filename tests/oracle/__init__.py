"""Independent oracles: what a rewrite must equal, in plain eager PyTorch, with nothing of avl_fx in it."""

from tests.oracle.avl import AvlOracle, avl_oracle
from tests.oracle.lazy import LazyOracle, lazy_oracle

__all__ = ["AvlOracle", "LazyOracle", "avl_oracle", "lazy_oracle"]
