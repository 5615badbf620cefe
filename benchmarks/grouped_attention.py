"""One decode step's attention with grouped keys: read as they are, against repeated for every query head.

What `lower` does to a grouped-query site, in isolation. Repeated keys are what models hand to SDPA when there is a
mask; the results are compared before any time is printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks._report import console, save, summary

HEADS, KV_HEADS, KEYS, HEAD_DIM = 12, 4, 2880, 64
REPEATS = 30


def repeated(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """SDPA on keys and values repeated as transformers' `repeat_kv` does."""
    batch, kv_heads, keys, dim = key.shape
    groups = query.shape[1] // kv_heads

    def repeat(x: Tensor) -> Tensor:
        return x[:, :, None].expand(batch, kv_heads, groups, keys, dim).reshape(batch, kv_heads * groups, keys, dim)

    return F.scaled_dot_product_attention(query, repeat(key), repeat(value), attn_mask=mask)


def grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """SDPA on keys and values as the cache holds them."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def measure(batch: int) -> list[dict[str, Any]]:
    """Median time of each way, taking turns, at one batch size."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, generator=generator)
    key, value = (torch.randn(batch, KV_HEADS, KEYS, HEAD_DIM, generator=generator) for _ in range(2))
    mask = torch.ones(batch, 1, 1, KEYS, dtype=torch.bool)
    ways: dict[str, Callable[..., Tensor]] = {
        "repeated, eager": repeated,
        "repeated, Inductor": torch.compile(repeated, dynamic=False),
        "grouped, eager": grouped,
        "grouped, Inductor": torch.compile(grouped, dynamic=False),
    }
    expected = repeated(query.double(), key.double(), value.double(), mask)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(REPEATS + 3):
        for name, way in ways.items():
            start = time.perf_counter()
            got = way(query, key, value, mask)
            took = time.perf_counter() - start
            torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)
            if turn >= 3:
                seconds[name].append(took)
    return [{"batch": batch, "way": name, **summary(times)} for name, times in seconds.items()]


def main() -> list[dict[str, Any]]:
    """Measure batch 1 and 4, print a table, save the figures."""
    with torch.no_grad():
        rows = [row for batch in (1, 4) for row in measure(batch)]
    table = Table(title=f"One query, {KEYS} keys, {HEADS}/{KV_HEADS} heads, float32, {torch.get_num_threads()} threads")
    for column in ("batch", "way", "median", "quartiles", "over repeated Inductor"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        base = next(r for r in rows if r["batch"] == row["batch"] and r["way"] == "repeated, Inductor")
        table.add_row(
            str(row["batch"]),
            row["way"],
            f"{row['median_ms']:.2f} ms",
            f"{row['q1_ms']:.2f}..{row['q3_ms']:.2f}",
            f"{base['median_ms'] / row['median_ms']:.1f}x",
        )
    console.print(table)
    console.print(f"saved: {save('grouped_attention', rows)}")
    return rows


if __name__ == "__main__":
    main()
