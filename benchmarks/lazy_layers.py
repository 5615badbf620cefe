"""Decode with lazy layers against the same decode with dense ones: attention alone, and whole steps.

Six of eight layers are lazy. In mode ``gla`` they read their anchor's logits and their values; in ``vla_scores`` their
anchor's logits against visual keys, their own text keys, and their values. *Dense* is the identity plan, whose steps
have the same kernels otherwise; *eager* the stock model, both on a dynamic cache of the sizes of `benchmarks.decode`.
*Both* is ``gla`` on top of the partitioned plan of that benchmark.

No ratio is printed unless, in that run, the attention calls equal float64 and the logits of the steps the eager oracle
of the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from avl_fx import Plan
from avl_fx.kernels.inherited_decode import anchor_decode, inherited_decode
from avl_fx.kernels.inherited_decode.reference import inherited_decode_reference, own_logits
from avl_fx.kernels.partitioned_decode.schema import partitioned_decode
from benchmarks._decoding import PLAN, REFRESH, TEXT, periods, visual_positions
from benchmarks._difference import largest_difference
from benchmarks._models import llava
from benchmarks._report import console, save, summary
from benchmarks.decode import (
    BATCHES,
    KV_HEADS,
    LAYERS,
    NEAR_TIE,
    SIZE,
    TOLERANCE,
    VISUAL,
    WARM_UP,
    Contenders,
    decode,
    in_turns,
)
from tests.oracle.avl import avl_oracle
from tests.oracle.lazy import lazy_oracle

BLOCKS = [(0, 3), (4, 7)]
HEADS, HEAD_DIM = 12, 64
CALLS = 40
"""Of each way of attending, after a few to warm up."""


def attention(kv_heads: int, visual: int, batch: int) -> dict[str, Any]:
    """Median time of one layer's attention: dense, an anchor's, and a lazy layer's in two modes."""
    generator = torch.Generator().manual_seed(0)
    keys = visual + TEXT
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, generator=generator)
    key, value = (torch.randn(batch, kv_heads, keys, HEAD_DIM, generator=generator) for _ in range(2))
    logits = own_logits(query, key, None, None, 0.125)
    spans = torch.tensor([[[TEXT // 2, visual]]]).repeat(batch, 1, 1)
    step = query, key, value, None, None, None, None, None, 0.125
    own = torch.roll(query, 1, 1)
    of_text = logits, own, key, value, None, None, None, None, spans, 0.125
    ways: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: partitioned_decode(*step)[0],
        "anchor": lambda: anchor_decode(*step)[0],
        "gla": lambda: inherited_decode(logits, None, None, value, None, None, None, None, None, 0.125),
        "vla_scores": lambda: inherited_decode(*of_text),
    }
    exact = inherited_decode_reference(logits.double().float(), None, None, value.double(), *[None] * 5, 0.125)
    for name, way in ways.items():
        expected = inherited_decode_reference(*of_text) if name == "vla_scores" else exact
        torch.testing.assert_close(way().double(), expected.double(), atol=1e-5, rtol=1e-4)
    source = torch.ones(16 << 20)
    target = torch.empty_like(source)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for call in range(CALLS + 3):
        for name, way in ways.items():
            target.copy_(source)  # empties the processor's caches, as the other layers do
            start = time.perf_counter()
            way()
            if call >= 3:
                seconds[name].append(time.perf_counter() - start)
    row = {name: summary(times) for name, times in seconds.items()}
    for figures in row.values():
        figures["over_dense"] = round(row["dense"]["median_ms"] / figures["median_ms"], 3)
    return row


def contenders(model: Any) -> Contenders:
    """Eager, and one a plan; nothing is compiled yet."""
    torch._dynamo.config.recompile_limit = 64  # they all share one code object
    plans = {
        "dense": Plan.identity(),
        "gla": Plan.lazy(BLOCKS),
        "vla_scores": Plan.lazy(BLOCKS, "vla_scores"),
        "both": PLAN.combine(Plan.lazy(BLOCKS)),
    }
    everyone: Contenders = {"eager": ("dynamic", model.forward)}
    for name, plan in plans.items():
        options = {"plan": plan, "strict": True}
        everyone[name] = ("dynamic", torch.compile(model.forward, backend="avl", options=options))
    return everyone


def expected(model: Any, name: str, batch: int, visual: int, steps: int) -> list[Tensor]:
    """Logits of the eager oracle. Where visual keys have to be known the first step is dense: it finds out."""
    run = decode(model, ("dynamic", model.forward), batch, visual, steps)
    where = {"decoder_prefix": "model.language_model.layers"}
    flags = visual_positions(batch, visual)
    if name == "both":
        settings = {"core": 0.3, "secondary": 0.5, "refresh": REFRESH, "text": 1.0}
        with avl_oracle(model, flags, **settings, blocks=BLOCKS, **where):  # type: ignore[arg-type]
            return [out for _, out in run]
    if name == "dense":
        return [out for _, out in run]
    first = [next(run)[1]] if name == "vla_scores" else []
    with lazy_oracle(model, BLOCKS, mode=name, visual=flags, **where):
        return first + [out for _, out in run]


def steps_of(model: Any, everyone: Contenders, batch: int, visual: int, steps: int) -> dict[str, Any]:
    """Whole decode steps: one cell of the grid."""
    seconds, logits = in_turns(model, everyone, batch, visual, steps)
    differences = {}
    for name in list(everyone)[1:]:
        wanted = expected(model, name, batch, visual, WARM_UP + 2)
        differences[name] = largest_difference(logits[name][: len(wanted)], wanted)
    exact = all(d <= (NEAR_TIE if name == "both" else TOLERANCE) for name, d in differences.items())
    row: dict[str, Any] = {"exact": exact, "differences": differences}
    row |= {name: summary(periods(times)) for name, times in seconds.items()}
    if exact:
        for name in everyone:
            row[name]["over_dense"] = round(row["dense"]["median_ms"] / row[name]["median_ms"], 3)
    return row


def main(
    steps: Annotated[int, typer.Option(help="timed decode steps a round", min=3)] = 12,
    visual: Annotated[list[int] | None, typer.Option(help="visual tokens")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="rows")] = None,
    kv_heads: Annotated[list[int] | None, typer.Option(help="key/value heads")] = None,
) -> list[dict[str, Any]]:
    """Measure the grid, print two tables, save the figures."""
    rows: list[dict[str, Any]] = []
    threads = f"{torch.get_num_threads()} threads"
    calls = Table(title=f"Attention of one layer, one query, in ms (over dense), {threads}")
    whole = Table(title=f"One decode step, 6 of 8 layers lazy, in ms (over dense), {threads}")
    for heads in kv_heads or KV_HEADS:
        for rows_of_batch in batch or BATCHES:
            torch._dynamo.reset()
            model = llava(layers=LAYERS, hidden=768, heads=HEADS, kv_heads=heads, visual_tokens=576)
            everyone = contenders(model)
            for tokens in visual or VISUAL:
                with torch.no_grad():
                    alone = attention(heads, tokens, rows_of_batch)
                    step = steps_of(model, everyone, rows_of_batch, tokens, steps)
                size = {"kv_heads": heads, "batch": rows_of_batch, "visual": tokens}
                if not rows:
                    for table, ways in ((calls, alone), (whole, everyone)):
                        for column in ("heads", "batch", "visual", *ways):
                            table.add_column(column, justify="right")
                rows.append({**size, "attention": alone, "step": step})
                facts = KV_HEADS[heads], str(rows_of_batch), str(tokens)
                calls.add_row(*facts, *map(cell, alone.values()))
                whole.add_row(*facts, *(cell(step[name]) for name in everyone))
                console.print(*facts, *(cell(step[n]) for n in everyone), "" if step["exact"] else step["differences"])
                saved = save("lazy_layers", rows, SIZE)  # what is measured is not lost when the rest cannot be
    console.print(calls)
    console.print(whole)
    console.print(f"saved: {saved}")
    if not all(row["step"]["exact"] for row in rows):
        raise typer.Exit(1)
    return rows


def cell(figures: dict[str, Any]) -> str:
    """Milliseconds, and the ratio where there is one."""
    ratio = f" ({figures['over_dense']:.2f}x)" if "over_dense" in figures else ""
    return f"{figures['median_ms']:.2f}{ratio}"


if __name__ == "__main__":
    typer.run(main)
