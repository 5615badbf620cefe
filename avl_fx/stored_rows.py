"""Which tokens the rows of a compact cache stand for.

A compact cache holds fewer rows than the model has fed tokens. The rows of a batch row stand in the order of their
tokens, without those that were left out; new ones are appended behind the longest batch row. The model's masks have a
column for every token, so each row remembers the column that says who may see it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["StoredRows"]

_SPARE = 64


@dataclass
class StoredRows:
    """The layout of one compact cache, the same in all of its layers. All tensors are on the CPU.

    Shapes: B batch rows.
    """

    columns: Tensor
    """int64 ``[B, capacity]``: the mask's column of each row; ``-1`` where a batch row has none."""
    count: int
    """Rows in the cache."""
    length: int
    """Tokens fed so far."""
    ends: list[int]
    """For each batch row, where its rows ended when the cache was packed; kept up to date under a text window."""
    packed: int
    """Rows when the cache was packed: what came since stands behind them."""
    visual: list[int]
    """Visual tokens fed so far."""
    keyless: int = 0
    """The keys of lazy layers in the modes ``vla`` and ``vla_scores`` lack so many rows: in each batch row the first so
    many that are visual. As many as every batch row has, so that keys appended later lie at one place in all of them.
    """
    shown: list[int] | None = None
    """Under a text window, where a row of text may hold another token in each layer, all of them visible: a column that
    is visible too, or ``-1`` for a batch row whose text all stays."""

    @classmethod
    def of_complete(cls, length: int, visual: list[int]) -> StoredRows:
        """The layout of a cache that holds all of ``length`` tokens, ``visual`` of them visual."""
        columns = torch.arange(length, device="cpu").expand(len(visual), -1)
        return cls(columns, length, length, [length] * len(visual), length, visual)

    def extended(self, tokens: int, visual: list[int]) -> StoredRows:
        """The layout after ``tokens`` more were appended, ``visual`` of them visual."""
        more = torch.arange(self.length, self.length + tokens, device="cpu").expand(len(visual), -1)
        columns = torch.cat([self.columns[:, : self.count], more], 1)
        totals = [old + new for old, new in zip(self.visual, visual, strict=True)]
        return replace(self, columns=columns, count=self.count + tokens, length=self.length + tokens, visual=totals)

    def pack(self, keep: Tensor) -> tuple[StoredRows, Tensor, Tensor]:
        """Leave out all rows but ``keep`` bool ``[B, count]``.

        Returns:
            The new layout; for each of its rows the one that goes there, int64 ``[B, new count]`` with ``-1`` for none;
            and for each old row where it goes (unspecified for those that go), int64 ``[B, count]``.
        """
        ends = keep.sum(1)
        count = int(ends.max())
        places = (keep.cumsum(1) - 1).clamp(min=0)
        source = torch.full((len(keep), count), -1, dtype=torch.int64, device="cpu")
        for row, flags in enumerate(keep):
            source[row, : ends[row]] = flags.nonzero().flatten()
        columns = self.columns[:, : self.count].gather(1, source.clamp(min=0)).masked_fill(source < 0, -1)
        packed = replace(self, columns=columns, count=count, ends=ends.tolist(), packed=count)
        return packed, source, places

    def append(self) -> None:
        """A decode step stored one token a batch row, behind all others."""
        self._write(self.count, self.length)
        self.count += 1
        self.length += 1

    def close_ranks(self, ends: list[int]) -> None:
        """A decode step under a text window stored one token a batch row, and left out others: they end at ``ends``."""
        assert self.shown is not None
        for row, (old, new) in enumerate(zip(self.ends, ends, strict=True)):
            if new > old:
                self._write(old, self.length if self.shown[row] < 0 else self.shown[row], row)
        self.length += 1
        self.ends = ends
        self.count = self.packed = max(ends)
        for row, end in enumerate(ends):
            self.columns[row, end : self.count] = -1

    def select(self, index: Tensor) -> StoredRows:
        """The layout of a cache that holds the batch rows ``index`` of this one."""
        rows = index.tolist()
        return replace(
            self,
            columns=self.columns[index],
            ends=[self.ends[row] for row in rows],
            visual=[self.visual[row] for row in rows],
            shown=None if self.shown is None else [self.shown[row] for row in rows],
        )

    def cropped(self, tokens: int) -> StoredRows:
        """The layout without the last ``tokens``, all of which were appended since the cache was packed."""
        return replace(self, count=self.count - tokens, length=self.length - tokens)

    def _write(self, at: int, column: int, row: int | None = None) -> None:
        if at >= self.columns.shape[1]:
            more = self.columns.new_full((len(self.columns), max(_SPARE, at // 2)), -1)
            self.columns = torch.cat([self.columns, more], 1)
        self.columns[slice(None) if row is None else row, at] = column
