"""Dense decoding under the identity plan against PyTorch's own Inductor, on the same model in the same run.

Grouped-query models repeat keys and values for their query heads before SDPA; Inductor materialises that. Reading them
un-repeated is exact, and a gain before anything is left out. Contenders take turns step by step; the ratio is that of
the medians. No ratio is printed unless the logits agree in that run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from transformers import DynamicCache, StaticCache

from avl_fx import Plan
from benchmarks._models import llava, prompt
from benchmarks._report import console, save, summary

TOLERANCE = 1e-3
SHAPES = ({"kv_heads": 12, "label": "MHA 12/12"}, {"kv_heads": 4, "label": "GQA 12/4"})
WARM_UP = 3


def decode_steps(model: Any, forward: Callable[..., Any], cache_kind: str, batch: int, steps: int) -> Any:
    """A generator: each ``next`` runs one decode step and yields its seconds and logits."""
    inputs = prompt(model, batch)
    length = inputs["input_ids"].shape[1]
    total = length + WARM_UP + steps + 1
    text = model.config.get_text_config()
    cache = DynamicCache(config=text) if cache_kind == "dynamic" else StaticCache(config=text, max_cache_len=total)
    with torch.no_grad():
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1:]  # the prefill is eager for all
        for step in range(WARM_UP + steps):
            token = logits.argmax(-1) % 1000
            mask = torch.ones(batch, length + step + 1, dtype=torch.long)
            start = time.perf_counter()
            logits = forward(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            yield time.perf_counter() - start, logits


def measure(kv_heads: int, visual: int, batch: int, cache_kind: str, steps: int) -> dict[str, Any]:
    """Median decode step of eager, Inductor and avl, interleaved."""
    torch._dynamo.reset()
    model = llava(layers=8, hidden=768, heads=12, kv_heads=kv_heads, visual_tokens=visual)
    forwards = {
        "eager": model.forward,
        "inductor": torch.compile(model.forward),
        "avl": torch.compile(model.forward, backend="avl", options={"plan": Plan.identity(), "strict": True}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    runs = {name: decode_steps(model, f, cache_kind, batch, steps) for name, f in forwards.items()}
    worst = 0.0
    for step in range(WARM_UP + steps):
        logits = {}
        for name, run in runs.items():
            took, logits[name] = next(run)
            if step >= WARM_UP:
                seconds[name].append(took)
        worst = max(worst, (logits["avl"] - logits["eager"]).abs().max().item())
    row: dict[str, Any] = {"kv_heads": kv_heads, "visual": visual, "batch": batch, "cache": cache_kind}
    row |= {"max_difference": worst, "exact": worst <= TOLERANCE}
    row |= {name: summary(times) for name, times in seconds.items()}
    if row["exact"]:
        row["over_inductor"] = round(row["inductor"]["median_ms"] / row["avl"]["median_ms"], 3)
        row["over_eager"] = round(row["eager"]["median_ms"] / row["avl"]["median_ms"], 3)
    return row


def main(
    steps: Annotated[int, typer.Option(help="timed decode steps", min=4)] = 20,
    visual: Annotated[int, typer.Option(help="visual tokens, a square")] = 2916,
    batch: Annotated[int, typer.Option(help="rows", min=1)] = 4,
) -> list[dict[str, Any]]:
    """Measure MHA and GQA with both caches, print a table, save the figures."""
    rows = []
    for shape in SHAPES:
        for cache in ("dynamic", "static"):
            rows.append({"shape": shape["label"]} | measure(shape["kv_heads"], visual, batch, cache, steps))
    table = Table(title=f"Decode step, 8 layers x 768, {visual} visual tokens, batch {batch} (identity plan: exact)")
    for column in ("shape", "cache", "eager", "Inductor", "avl identity", "over Inductor", "over eager"):
        table.add_column(column, justify="right")
    for row in rows:
        times = [f"{row[n]['median_ms']:.1f} ({row[n]['q1_ms']:.1f}..{row[n]['q3_ms']:.1f}) ms" for n in row_names()]
        ratios = (
            [f"{row['over_inductor']:.2f}x", f"{row['over_eager']:.2f}x"]
            if row["exact"]
            else ["not exact", "not exact"]
        )
        table.add_row(row["shape"], row["cache"], *times, *ratios)
    console.print(table)
    console.print(f"saved: {save('decode_dense', rows)}")
    if not all(row["exact"] for row in rows):
        raise typer.Exit(1)
    return rows


def row_names() -> tuple[str, ...]:
    """Contenders, in the order of the table's columns."""
    return ("eager", "inductor", "avl")


if __name__ == "__main__":
    typer.run(main)
