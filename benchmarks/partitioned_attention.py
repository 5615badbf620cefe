"""One decode step's attention over text and core keys, against dense attention over the same cache, and against memory.

The cache is one visual span between two pieces of text, core first: what a partitioned step finds. Dense is
`scaled_dot_product_attention` with grouped keys, which is what an unpartitioned step costs after `lower`. The bound is
the time that this machine needs to read the keys and values in question, by the faster of a large copy and a large sum
in the same run. Before each measurement a large copy empties the processor's caches, as the weights and the other
layers do between two visits to a layer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

import avl_fx.kernels.partitioned_decode as _operator  # noqa: F401  (registers the operator)
from benchmarks._report import console, save, summary

HEADS = ((12, 12), (12, 4))
VISUAL = (576, 2880, 11520)
BATCHES = (1, 4, 8)
TEXT, HEAD_DIM, CORE, CAPACITY = 32, 64, 0.3, 128
SECONDS = 0.6
"""How long each way is repeated, at least."""
LARGE = 2**40


def case(heads: int, kv_heads: int, visual: int, batch: int) -> tuple[dict[str, Callable[[], Tensor]], float]:
    """The ways to compare, their results already found equal to float64; and the bytes of the keys that core reads."""
    generator = torch.Generator().manual_seed(0)
    keys, core = visual + 2 * TEXT, int(CORE * visual)
    query = torch.randn(batch, heads, 1, HEAD_DIM, generator=generator)
    buffers = [torch.randn(batch, kv_heads, keys + CAPACITY, HEAD_DIM, generator=generator) for _ in range(2)]
    key, value = (buffer[:, :, :keys] for buffer in buffers)
    core_ranges = torch.tensor([[[0, TEXT + core], [TEXT + visual, LARGE]]]).repeat(batch, 1, 1)
    all_ranges = torch.tensor([[[0, LARGE], [0, 0]]]).repeat(batch, 1, 1)
    yes, no = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def stock() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=0.125, enable_gqa=True)

    def partitioned(segments: Tensor, weigh: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.ops.avl.partitioned_decode(query, key, value, None, None, None, segments, weigh, 0.125)[0]

    read = torch.cat([torch.arange(TEXT + core), torch.arange(TEXT + visual, keys)])
    exact = query.double()
    dense = F.scaled_dot_product_attention(exact, key.double(), value.double(), scale=0.125, enable_gqa=True)
    sparse = F.scaled_dot_product_attention(
        exact, key[:, :, read].double(), value[:, :, read].double(), scale=0.125, enable_gqa=True
    )
    ways = {
        "dense": (stock, dense),
        "dense, operator": (partitioned(all_ranges, no), dense),
        "core": (partitioned(core_ranges, no), sparse),
        "core, weights": (partitioned(core_ranges, yes), sparse),
    }
    for way, expected in ways.values():
        torch.testing.assert_close(way().double(), expected, atol=1e-5, rtol=1e-4)
    return {name: way for name, (way, _) in ways.items()}, 2.0 * batch * kv_heads * len(read) * HEAD_DIM * 4


def measure(heads: int, kv_heads: int, visual: int, batch: int) -> list[dict[str, Any]]:
    """Median time of each way, taking turns with one another and with a large copy."""
    ways, core_bytes = case(heads, kv_heads, visual, batch)
    source = torch.ones(32 << 20)
    target = torch.empty_like(source)
    everything: dict[str, Callable[[], Any]] = {"sum": source.sum, **ways}
    seconds: dict[str, list[float]] = {name: [] for name in ("copy", *everything)}
    begin, turns = time.perf_counter(), 0
    while turns < 8 or time.perf_counter() - begin < SECONDS * len(ways):
        for name, way in everything.items():
            start = time.perf_counter()
            target.copy_(source)
            copied = time.perf_counter()
            way()
            took = time.perf_counter() - copied
            if turns >= 3:
                seconds["copy"].append(copied - start)
                seconds[name].append(took)
        turns += 1
    copying, summing = (summary(seconds.pop(name))["median_ms"] * 1e-3 for name in ("copy", "sum"))
    speed = source.nbytes * max(2 / copying, 1 / summing)
    shape = {"heads": heads, "kv_heads": kv_heads, "visual": visual, "batch": batch}
    dense = summary(seconds["dense"])["median_ms"]
    share = core_bytes / (2.0 * batch * kv_heads * (visual + 2 * TEXT) * HEAD_DIM * 4)
    rows = []
    for name, times in seconds.items():
        figures = summary(times)
        bound = core_bytes / speed * 1e3 / (1 if name.startswith("core") else share)
        rows.append(
            {
                **shape,
                "way": name,
                **figures,
                "bound_ms": round(bound, 4),
                "bytes_per_second": round(speed),
                "over_dense": round(dense / figures["median_ms"], 2),
                "over_bound": round(figures["median_ms"] / bound, 2),
            }
        )
    return rows


def main() -> list[dict[str, Any]]:
    """Measure every size, print a table, save the figures."""
    rows = []
    with torch.no_grad():
        for heads, kv_heads in HEADS:
            for visual in VISUAL:
                for batch in BATCHES:
                    rows += measure(heads, kv_heads, visual, batch)
    table = Table(title=f"One query, {CORE:.0%} of the visual keys, float32, {torch.get_num_threads()} threads")
    for column in ("heads", "visual keys", "batch", "way", "median", "quartiles", "over dense", "of the bound"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        table.add_row(
            f"{row['heads']}/{row['kv_heads']}",
            str(row["visual"]),
            str(row["batch"]),
            row["way"],
            f"{row['median_ms']:.3f} ms",
            f"{row['q1_ms']:.3f}..{row['q3_ms']:.3f}",
            f"{row['over_dense']:.2f}x",
            f"{row['over_bound']:.2f}",
        )
    console.print(table)
    console.print(f"saved: {save('partitioned_attention', rows)}")
    return rows


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
