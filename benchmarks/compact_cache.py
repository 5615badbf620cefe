"""Decode steps on an `AVLCache`, beside those of `benchmarks.decode` on stock caches, in one run.

Which rows a compact cache holds is settled at the end of a prompt, so here one is run, of random embeddings: once into
an `AVLCache` and once into a stock cache, both partitioned. A ratio is printed only if the two give the same logits,
and if the gate of `benchmarks.decode` holds for everyone else. Prompts cost far more than steps: the sizes are fewer.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

import avl_fx
from avl_fx import AVLCache
from benchmarks import decode
from benchmarks._decoding import PLAN, TEXT, periods, visual_positions
from benchmarks._difference import largest_difference
from benchmarks._models import llava
from benchmarks._report import console, save, summary

SIZES = ((1, 576), (1, 2880), (4, 2880))
"""Batch and visual tokens."""
SHOWN = ("partitioned, dynamic", "partitioned, static", "partitioned, compact")


def converse(model: Any, forward: Any, cache: Any, batch: int, visual: int, steps: int) -> list[tuple[float, Tensor]]:
    """Seconds and logits of each of ``steps`` steps behind a prompt."""
    embeddings = torch.randn(
        batch, visual + TEXT, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(2)
    )
    mask = torch.ones(batch, visual + TEXT + steps, dtype=torch.long)
    run = []
    with torch.no_grad(), avl_fx.modality_ids(visual_positions(batch, visual)):
        more = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        forward(inputs_embeds=embeddings, attention_mask=mask[:, : visual + TEXT], **more)
        for step in range(steps):
            token = torch.full((batch, 1), 10 + step)
            start = time.perf_counter()
            logits = forward(input_ids=token, attention_mask=mask[:, : visual + TEXT + step + 1], **more).logits
            run.append((time.perf_counter() - start, logits))
    return run


def measure(model: Any, batch: int, visual: int, steps: int) -> dict[str, Any]:
    """One size."""
    everyone = decode.contenders(model)
    row = decode.measure(model, everyone, batch, visual, steps)
    forward, compact = everyone["partitioned, dynamic"][1], AVLCache(PLAN, model.config)
    stock = DynamicCache(config=model.config.get_text_config())
    _, expected = zip(*converse(model, forward, stock, batch, visual, decode.WARM_UP + steps), strict=True)
    seconds, logits = zip(*converse(model, forward, compact, batch, visual, decode.WARM_UP + steps), strict=True)
    difference = largest_difference(logits, expected)
    row["differences"]["partitioned, compact"] = difference
    row["partitioned, compact"] = summary(periods(seconds[decode.WARM_UP :]))
    row["stored_over_dense"] = round(compact.stored_bytes / compact.dense_bytes, 4)
    row["exact"] = row["exact"] and difference <= decode.NEAR_TIE
    if row["exact"]:
        baseline = row[row["fastest_baseline"]]["median_ms"]
        row["partitioned, compact"]["over_baseline"] = round(baseline / row["partitioned, compact"]["median_ms"], 3)
    return row


def main(steps: Annotated[int, typer.Option(help="timed decode steps a round", min=3)] = 12) -> list[dict[str, Any]]:
    """Measure, print a table, save the figures."""
    table = Table(title=f"One decode step in ms (over the fastest baseline), {torch.get_num_threads()} threads")
    for column in ("heads", "visual", "batch", "fastest baseline", *SHOWN, "stored / dense"):
        table.add_column(column, justify="right")
    rows = []
    for heads, name in decode.KV_HEADS.items():
        for batch, visual in SIZES:
            torch._dynamo.reset()
            model = llava(layers=decode.LAYERS, hidden=768, heads=12, kv_heads=heads, visual_tokens=576)
            row = {"kv_heads": heads} | measure(model, batch, visual, steps)
            rows.append(row)
            if not row["exact"]:
                console.print(f"[red]not equal: {row['differences']}")
                continue
            baseline = f"{row['fastest_baseline']} {row[row['fastest_baseline']]['median_ms']:.1f}"
            cells = [decode.cell(row[name]) for name in SHOWN]
            table.add_row(name, str(visual), str(batch), baseline, *cells, f"{row['stored_over_dense']:.2f}")
    console.print(table)
    console.print(f"saved: {save('compact_cache', rows)}")
    if not all(row["exact"] for row in rows):
        raise typer.Exit(1)
    return rows


if __name__ == "__main__":
    typer.run(main)
