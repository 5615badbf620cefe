"""What a graph that appends to a compact cache needs before each call: proof that it may, and its mask's columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avl_fx.errors import CacheStateError
from avl_fx.partition import Partition
from avl_fx.passes.context import CompactRows, StoredTensor

__all__ = ["CompactCalls"]


@dataclass(frozen=True)
class CompactCalls:
    """Serves the calls of one graph."""

    stored: tuple[StoredTensor, ...]
    takes_columns: bool

    @classmethod
    def of(cls, rows: CompactRows) -> CompactCalls:
        """What serves a graph that meets it as ``rows`` says."""
        return cls(tuple(rows.stored), rows.columns is not None)

    def inputs(self, args: Sequence[Any], state: Partition | None) -> tuple[Tensor, ...]:
        """The columns of the rows that are there, where the graph takes them.

        Args:
            args: the graph's inputs.
            state: that of the cache, where it is known.

        Raises:
            CacheStateError: rows are missing, and nothing says which.
        """
        stored = None if state is None else state.stored
        for tensor in self.stored:
            if tensor.complete or stored is None:
                self._check_complete(args, tensor)
        if not self.takes_columns:
            return ()
        rows = args[self.stored[0].before]
        if stored is not None:
            return (stored.columns[:, : stored.count].to(rows.device).contiguous(),)
        return (torch.arange(rows.shape[2], device=rows.device).expand(rows.shape[0], -1).contiguous(),)

    @staticmethod
    def _check_complete(args: Sequence[Any], tensor: StoredTensor) -> None:
        rows = args[tensor.before].shape[2]
        length = args[tensor.length] if tensor.symbolic else tensor.length
        if rows != length:
            raise CacheStateError(
                f"this compact cache holds {rows} rows of {length} tokens, and which ones is not known here: it was "
                "filled under another plan or by another model, or its tensors were replaced or written to",
                field="past_key_values",
                remedy="use a fresh AVLCache; every step on it must run compiled, under the plan that it was made for; "
                "if it did, a graph was refused its rewrite and avl_fx.explain(model, plan, ...) says why",
            )
