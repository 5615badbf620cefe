"""Whole decode steps of a decoder whose cache holds latents (multi-head latent attention), measured as in `decode`.

Four layers of DeepSeek-V3 without experts, hidden 768, 16 heads, over 512 latents and a rotated key of 64 a token. The
stock model makes keys and values of all heads from all of them at each step; under every plan of avl a step reads the
latents as they are (`avl_fx.passes.absorb_latents`).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks._models import llava
from benchmarks._report import console, save
from benchmarks.decode import cell, contenders, measure

LAYERS, HIDDEN, HEADS, RANK = 4, 768, 16, 512
SIZES = ((1, 576), (1, 2880), (4, 576))
"""Batch and visual tokens."""


def main(steps: Annotated[int, typer.Option(help="timed decode steps a round, in threes", min=3)] = 9) -> None:
    """Measure the sizes, print a table, save the figures."""
    steps -= steps % 3
    rows: list[dict[str, Any]] = []
    table = Table(title=f"One decode step in ms (over the fastest baseline), {torch.get_num_threads()} threads")
    for batch, visual in SIZES:
        torch._dynamo.reset()
        model = llava(LAYERS, HIDDEN, HEADS, HEADS, visual_tokens=576, rank=RANK)
        everyone = contenders(model)
        if not rows:
            for column in ("visual", "batch", *everyone):
                table.add_column(column, justify="right")
        rows.append(measure(model, everyone, batch, visual, steps))
        cells = [cell(rows[-1][name]) for name in everyone]
        table.add_row(str(visual), str(batch), *cells)
        console.print(batch, visual, *cells, "" if rows[-1]["exact"] else rows[-1]["differences"])
        saved = save("latent_attention", rows, ("batch", "visual"))
    console.print(table)
    console.print(f"saved: {saved}")
    if not all(row["exact"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
