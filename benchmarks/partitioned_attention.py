"""One decode step's attention over text and core keys, against dense attention over the same cache, and against memory.

The cache is one visual span between two pieces of text, core first: what a partitioned step finds. Dense is
`scaled_dot_product_attention` with grouped keys, which is what an unpartitioned step costs after `lower`. The bound is
the time that this machine needs to read the keys and values in question, by the faster of a large copy and a large sum
in the same run.

Attention stands where it stands in a step: between the linear layers of a Llama-like layer, in several layers, each
with weights and a cache of its own. So a layer's keys, and the code of a call, have left the processor's caches when it
is visited again. Dense attention stands between ATen's linear layers, the others between those of a compiled step. Only
attention is timed.
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

import avl_fx.kernels.narrow_linear as _linear  # noqa: F401  (registers the operator)
import avl_fx.kernels.partitioned_decode as _operator  # noqa: F401
from benchmarks._report import console, save, summary

HEADS = ((12, 12), (12, 4))
VISUAL = (576, 2880, 11520)
BATCHES = (1, 4, 8)
DENSE = "dense"
TEXT, HEAD_DIM, CORE, CAPACITY = 32, 64, 0.3, 128
LAYERS = 4
WIDTH, INNER = 768, 2048
"""Sizes of the linear layers: of hidden states, and between the two halves of an MLP."""
SECONDS = 1.0
"""How long each way is repeated, at least."""
TURNS = 18
"""How often, at least; the first three do not count."""
LARGE = 2**40
Way = Callable[[], Tensor]
Part = Callable[[Any], None]


def case(heads: int, kv_heads: int, visual: int, batch: int) -> tuple[dict[str, Way], float]:
    """The ways for one layer, their results found equal to float64; and the bytes of the keys that core reads."""
    keys, core = visual + 2 * TEXT, int(CORE * visual)
    query = torch.randn(batch, heads, 1, HEAD_DIM)
    buffers = [torch.randn(batch, kv_heads, keys + CAPACITY, HEAD_DIM) for _ in range(2)]
    key, value = (buffer[:, :, :keys] for buffer in buffers)
    core_ranges = torch.tensor([[[0, TEXT + core], [TEXT + visual, LARGE]]]).repeat(batch, 1, 1)
    all_ranges = torch.tensor([[[0, LARGE], [0, 0]]]).repeat(batch, 1, 1)
    yes, no = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    call = torch.ops.avl.partitioned_decode.default

    def stock() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=0.125, enable_gqa=True)

    def partitioned(segments: Tensor, weigh: Tensor) -> Way:
        return lambda: call(query, key, value, None, None, None, segments, weigh, 0.125)[0]

    read = torch.cat([torch.arange(TEXT + core), torch.arange(TEXT + visual, keys)])
    exact = query.double()
    dense = F.scaled_dot_product_attention(exact, key.double(), value.double(), scale=0.125, enable_gqa=True)
    sparse = F.scaled_dot_product_attention(
        exact, key[:, :, read].double(), value[:, :, read].double(), scale=0.125, enable_gqa=True
    )
    ways = {
        DENSE: (stock, dense),
        "dense, operator": (partitioned(all_ranges, no), dense),
        "core": (partitioned(core_ranges, no), sparse),
        "core, weights": (partitioned(core_ranges, yes), sparse),
    }
    for way, expected in ways.values():
        torch.testing.assert_close(way().double(), expected, atol=1e-5, rtol=1e-4)
    return {name: way for name, (way, _) in ways.items()}, 2.0 * batch * kv_heads * len(read) * HEAD_DIM * 4


def surroundings(heads: int, kv_heads: int, batch: int) -> tuple[list[Part], list[Part]]:
    """What comes before and behind attention in each layer, given a linear layer to compute with."""
    hidden, middle = torch.randn(batch, 1, WIDTH), torch.randn(batch, 1, INNER)
    before: list[Part] = []
    behind: list[Part] = []
    for _ in range(LAYERS):
        qkv = torch.randn((heads + 2 * kv_heads) * HEAD_DIM, WIDTH)
        output, gate, up, down = (torch.randn(sizes) for sizes in ((WIDTH,) * 2, *[(INNER, WIDTH)] * 2, (WIDTH, INNER)))

        def first(linear: Any, qkv: Tensor = qkv) -> None:
            linear(hidden, qkv, None)

        def rest(linear: Any, weights: tuple[Tensor, ...] = (output, gate, up), down: Tensor = down) -> None:
            for weight in weights:
                linear(hidden, weight, None)
            linear(middle, down, None)

        before.append(first)
        behind.append(rest)
    return before, behind


def measure(heads: int, kv_heads: int, visual: int, batch: int) -> list[dict[str, Any]]:
    """Median time of each way in a layer, taking turns with one another and with a large copy and sum."""
    torch.manual_seed(0)
    cases = [case(heads, kv_heads, visual, batch) for _ in range(LAYERS)]
    layers, core_bytes = [ways for ways, _ in cases], cases[0][1]
    before, behind = surroundings(heads, kv_heads, batch)
    source = torch.ones(32 << 20)
    target = torch.empty_like(source)
    reading: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "sum": source.sum}
    seconds: dict[str, list[float]] = {name: [] for name in (*reading, *layers[0])}
    begin, turns = time.perf_counter(), 0
    while turns < TURNS or time.perf_counter() - begin < SECONDS * len(layers[0]):
        for name, way in reading.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
        for name in layers[0]:
            linear = F.linear if name == DENSE else torch.ops.avl.narrow_linear.default
            taken = 0.0
            for ways, first, rest in zip(layers, before, behind, strict=True):
                first(linear)
                start = time.perf_counter()
                ways[name]()
                taken += time.perf_counter() - start
                rest(linear)
            seconds[name].append(taken / LAYERS)
        turns += 1
    seconds = {name: times[3:] for name, times in seconds.items()}
    copying, summing = (summary(seconds.pop(name))["median_ms"] * 1e-3 for name in reading)
    speed = source.nbytes * max(2 / copying, 1 / summing)
    shape = {"heads": heads, "kv_heads": kv_heads, "visual": visual, "batch": batch}
    dense = summary(seconds[DENSE])["median_ms"]
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
