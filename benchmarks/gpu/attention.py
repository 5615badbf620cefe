"""The attention of one layer in one decode step, alone: what the model's own operators, flex_attention and ours take.

Each way goes through several caches in turn, together larger than the device's own cache, as a step goes through its
layers. *launched* is a call from Python; *replayed* is its share in a CUDA graph of one call for each cache, which is
what remains under `reduce-overhead`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import avl_fx.kernels.partitioned_decode as _operator  # noqa: F401  (registers the operator)
from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from benchmarks._decoding import PLAN, TEXT
from benchmarks.gpu.gate import Reference, verdict
from benchmarks.gpu.probe import Probe
from benchmarks.gpu.settings import Cell, Settings
from benchmarks.gpu.shapes import shape
from benchmarks.gpu.timing import Stopwatch, deciles, replay, sets_beyond_the_cache

__all__ = ["AttentionBench"]

WARM_UP, CALLS, REPLAYS, MOST_SETS = 5, 60, 20, 256
SPARE = 64
"""Rows of a buffer behind those that are occupied."""
LARGE = 2**40


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value of one cache to the result; all caches of a cell are alike."""


@dataclass(frozen=True)
class Way:
    """One way to attend."""

    name: str
    make: Callable[[AttentionBench], Attend]
    """Called in the process that measures."""
    reads: str = "all"
    """Which keys: ``all``, or text and ``core``, or text and ``secondary``."""
    ours: bool = False

    @property
    def partitioned(self) -> bool:
        """Whether it leaves keys out."""
        return self.reads != "all"


class AttentionBench:
    """One cell: a few caches, and what each choice of keys has to give."""

    def __init__(self, cell: Cell, settings: Settings) -> None:
        self.settings, self.batch, self.shape = settings, cell.batch, shape(cell.model)
        self.stopwatch = Stopwatch(settings.device)
        policy = PLAN.vision_policy
        assert policy is not None
        visual = self.shape.visual
        self.counts = {"all": visual, "core": int(policy.core * visual), "secondary": int(policy.secondary * visual)}
        self.rows = sorted({0, cell.batch - 1})
        one = 2 * self.batch * self.shape.kv_heads * (visual + TEXT + SPARE) * self.shape.head_dim
        self.generator = torch.Generator(settings.device).manual_seed(0)
        sets = sets_beyond_the_cache(settings.device, one * settings.torch_dtype.itemsize)
        self.sets = [self._set() for _ in range(min(MOST_SETS, sets))]
        self.references = {reads: self._reference(reads) for reads in self.counts}

    def facts(self) -> dict[str, Any]:
        """What every contender of this cell meets."""
        return {
            "heads": self.shape.heads,
            "kv_heads": self.shape.kv_heads,
            "head_dim": self.shape.head_dim,
            "keys": self.shape.visual + TEXT,
            "caches": len(self.sets),
            "bytes": {reads: self._bytes(reads) for reads in self.counts},
        }

    @staticmethod
    def names() -> list[str]:
        """Who takes part."""
        return list(WAYS)

    def measure(self, name: str) -> dict[str, Any]:
        """Time and verdict of one way."""
        way = WAYS[name]
        attend = way.make(self)
        calls = [partial(attend, *each) for each in self.sets]
        with torch.no_grad(), Probe(self.settings.device) as probe:
            spent, results = self.stopwatch.time(lambda: [call() for call in calls])
            launched = [self.stopwatch.time(calls[turn % len(calls)])[0] for turn in range(WARM_UP + CALLS)]
            probe.warmed_up(spent)
            replayed = self._replayed(calls)
        got = torch.stack([results[0][self.rows], results[-1][self.rows]]).float()
        found = {
            "gate": verdict(got, self.references[way.reads], self.settings.torch_dtype),
            "ms": deciles(replayed or launched[WARM_UP:]),
            "launched_ms": deciles(launched[WARM_UP:]),
            "bytes": self._bytes(way.reads),
            **probe.facts(),
        }
        return found | ({"replayed": True} if replayed else {})

    def _replayed(self, calls: list[Callable[[], Tensor]]) -> list[float]:
        """Seconds of one call in a CUDA graph of all of them; nothing on a CPU."""
        if torch.device(self.settings.device).type != "cuda":
            return []
        run = replay(calls)
        return [self.stopwatch.time(run)[0] / len(calls) for _ in range(WARM_UP + REPLAYS)][WARM_UP:]

    def _set(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value; the latter two are the occupied part of a buffer."""
        heads, keys = self.shape.heads, self.shape.visual + TEXT
        query = self._drawn(heads, 1)
        buffers = [self._drawn(self.shape.kv_heads, keys + SPARE) for _ in range(2)]
        return query, *(buffer[:, :, :keys] for buffer in buffers)

    def _drawn(self, heads: int, rows: int) -> Tensor:
        size = (self.batch, heads, rows, self.shape.head_dim)
        how = {"device": self.settings.device, "dtype": self.settings.torch_dtype}
        return torch.randn(size, generator=self.generator, **how)

    def _read(self, reads: str) -> Tensor:
        """Positions of the keys that are read: text and the first visual keys."""
        front, back = self.gap(reads)
        keys = torch.arange(self.shape.visual + TEXT, device=self.settings.device)
        return keys[(keys < front) | (keys >= back)]

    def gap(self, reads: str) -> tuple[int, int]:
        """The first key that is not read, and the first behind it that is read again."""
        return TEXT // 2 + self.counts[reads], TEXT // 2 + self.shape.visual

    def _bytes(self, reads: str) -> int:
        rows = self.counts[reads] + TEXT
        return 2 * self.batch * self.shape.kv_heads * rows * self.shape.head_dim * self.settings.torch_dtype.itemsize

    def _reference(self, reads: str) -> Reference:
        """The results ``[2, rows, ...]`` of the first and the last cache."""

        def run(choice: str, dtype: torch.dtype) -> Tensor:
            read = self._read(choice)
            results = []
            for query, key, value in (self.sets[0], self.sets[-1]):
                parts = (query, key[:, :, read], value[:, :, read])
                results.append(_plain(*(part[self.rows].to(dtype) for part in parts)).float())
            return torch.stack(results)

        exact, plain = run(reads, torch.float32), run(reads, self.settings.torch_dtype)
        dense = None if reads == "all" else run("all", torch.float32)
        return Reference("matmul, softmax, matmul over those keys, float32", exact, plain, dense)


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the eager attention of transformers has it."""
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value.repeat_interleave(groups, 1)


# ---- the ways --------------------------------------------------------------------------------------------------------


def _repeated(bench: AttentionBench) -> Attend:
    groups = bench.shape.heads // bench.shape.kv_heads

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if groups > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value)

    return attend


def _grouped(bench: AttentionBench) -> Attend:
    return partial(F.scaled_dot_product_attention, enable_gqa=True)


def _flex(reads: str = "all") -> Callable[[AttentionBench], Attend]:
    def make(bench: AttentionBench) -> Attend:
        attend = torch.compile(flex_attention, dynamic=False) if bench.settings.codegen else flex_attention
        mask = None
        if reads != "all":
            front, back = bench.gap(reads)
            sizes = (None, None, 1, bench.shape.visual + TEXT)
            mask = create_block_mask(lambda b, h, q, k: (k < front) | (k >= back), *sizes, device=bench.settings.device)
        return partial(attend, block_mask=mask, enable_gqa=True)

    return make


def _ours(reads: str, weigh: bool = False) -> Callable[[AttentionBench], Attend]:
    def make(bench: AttentionBench) -> Attend:
        front, back = bench.gap(reads)
        segments = torch.zeros(bench.batch, MAX_SEGMENTS, 2, dtype=torch.int64)
        segments[:, 0, 1] = LARGE if reads == "all" else front
        if reads != "all":
            segments[:, 1] = torch.tensor([back, LARGE])
        ranges = segments.to(bench.settings.device)
        wanted = torch.tensor([int(weigh)], dtype=torch.int32, device=bench.settings.device)
        scale, decode = bench.shape.head_dim**-0.5, torch.ops.avl.partitioned_decode.default
        return lambda query, key, value: decode(query, key, value, None, None, None, ranges, wanted, scale)[0]

    return make


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("SDPA, repeated keys", _repeated),
        Way("SDPA, grouped keys", _grouped),
        Way("flex_attention", _flex()),
        Way("flex_attention, core", _flex("core"), "core"),
        Way("partitioned_decode, all keys", _ours("all"), ours=True),
        Way("partitioned_decode, core", _ours("core"), "core", ours=True),
        Way("partitioned_decode, refresh", _ours("secondary", weigh=True), "secondary", ours=True),
    )
}
