"""What a graph that appends to a compact cache needs before each call: proof that it may, and which rows are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avl_fx.errors import CacheStateError
from avl_fx.partition import Partition
from avl_fx.passes.context import CompactRows, StoredTensor
from avl_fx.passes.site import Status

__all__ = ["CompactCalls"]


@dataclass(frozen=True)
class CompactCalls:
    """Serves the calls of one graph."""

    stored: tuple[StoredTensor, ...]
    takes_columns: bool
    takes_key_rows: bool
    short: frozenset[int]
    """Input positions of keys that may lack visual rows."""

    @classmethod
    def of(cls, rows: CompactRows) -> CompactCalls:
        """What serves a graph that meets it as ``rows`` says."""
        # A site that a later stage refused attends to what is there.
        short = {position for position, site in rows.short.items() if site.status is not Status.REFUSED}
        return cls(tuple(rows.stored), rows.columns is not None, rows.key_rows is not None, frozenset(short))

    def inputs(self, args: Sequence[Any], state: Partition | None) -> tuple[Tensor, ...]:
        """The columns of the rows that are there, and where lazy layers have their keys, as the graph takes them.

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
            else:
                left_out = stored.keyless if tensor.before in self.short else 0
                self._check_rows(args[tensor.before].shape[2], stored.count - left_out)
        if not (self.takes_columns or self.takes_key_rows):
            return ()
        rows: Tensor = args[self.stored[0].before]
        found = []
        if self.takes_columns:
            found.append(_every_row(rows) if stored is None else stored.columns[:, : stored.count])
        if self.takes_key_rows:
            found.append(_every_row(rows) if state is None or stored is None else state.key_rows)
        return tuple(table.to(rows.device).contiguous() for table in found)

    @staticmethod
    def _check_rows(rows: int, count: int) -> None:
        if rows != count:
            raise CacheStateError(
                f"a layer of this compact cache holds {rows} rows, and a graph asks for {count}: keys that lazy layers "
                "do without were not stored",
                field="cache",
                remedy="use a stock cache: avl_fx.explain(model, plan, ...) says which lazy layers were refused",
            )

    @staticmethod
    def _check_complete(args: Sequence[Any], tensor: StoredTensor) -> None:
        rows = args[tensor.before].shape[2]
        length = args[tensor.length] if tensor.symbolic else tensor.length
        if rows != length:
            raise CacheStateError(
                f"this compact cache holds {rows} rows of {length} tokens, and which ones is not known here: it was "
                "filled under another plan or by another model, or its tensors were replaced or written to",
                field="cache",
                remedy="use a fresh AVLCache; every step on it must run compiled, under the plan that it was made for; "
                "if it did, a graph was refused its rewrite and avl_fx.explain(model, plan, ...) says why",
            )


def _every_row(rows: Tensor) -> Tensor:
    """int64 ``[batch, keys]``: the numbers of the rows of ``rows`` ``[batch, kv_heads, keys, dim]``."""
    return torch.arange(rows.shape[2], device=rows.device).expand(rows.shape[0], -1)
