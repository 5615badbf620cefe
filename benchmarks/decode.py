"""Whole decode steps on a CPU: eager, PyTorch's own Inductor, and avl, on one model in one run.

A Llama-like decoder of 8 layers, hidden 768, 12 heads (MHA, or 4 key/value heads) over a cache of 576, 2,880 or 11,520
visual tokens between two pieces of text. The cache is filled at random: what a step costs does not depend on what is in
it, but for the rows that a refresh moves: among random keys two fifths of core, fewer where attention lasts from token
to token. Every contender steps through its own cache, one contender after the other, in two rounds. *Partitioned* is
`Plan.avl(core=0.3, secondary=0.5, refresh=3, text=None)`. Times are means over three successive steps, of which one
refreshes; medians and quartiles are of these.

The bound is the time to read what the plan must read once (all weights of the decoder and the output head, and the key
and value rows of the average step), by the faster of a large copy and a large sum in the same run.

A ratio is printed only if, in that run, the identity plan's logits equal the eager ones, and those of the partitioned
steps the masks-only oracle of the tests. Among thousands of random keys two may be as good as equal at the edge of
core, and then float32 decides: one key of hundreds is another, and logits differ by hundredths (dense and partitioned
ones differ by 2 to 3). That the two are equal where there are no such ties is for the tests to show.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

import avl_fx
from avl_fx import Plan
from benchmarks._decoding import PLAN, REFRESH, TEXT, filled, mean_share, periods, read_bytes, visual_positions
from benchmarks._difference import largest_difference
from benchmarks._models import llava
from benchmarks._report import console, save, summary
from tests.oracle.avl import avl_oracle

TOLERANCE, NEAR_TIE = 1e-3, 0.1
KV_HEADS = {12: "MHA 12/12", 4: "GQA 12/4"}
VISUAL = (576, 2880, 11520)
BATCHES = (1, 4, 8)
SIZE = ("kv_heads", "batch", "visual")
"""What tells the rows of the grid apart."""
LAYERS = 8
WARM_UP, ROUNDS = 5, 2

Contenders = dict[str, tuple[str, Callable[..., Any]]]
"""Name -> kind of cache, and what stands for the model's forward."""


def contenders(model: Any) -> Contenders:
    """Everything that takes part; nothing is compiled yet."""
    torch._dynamo.config.recompile_limit = 64  # they all share one code object

    def avl(plan: Plan) -> Callable[..., Any]:
        return torch.compile(model.forward, backend="avl", options={"plan": plan, "strict": True})

    inductor, identity, partitioned = torch.compile(model.forward), avl(Plan.identity()), avl(PLAN)
    return {
        "eager, dynamic": ("dynamic", model.forward),
        "eager, static": ("static", model.forward),
        "Inductor, dynamic": ("dynamic", inductor),
        "Inductor, static": ("static", inductor),
        "identity, dynamic": ("dynamic", identity),
        "identity, static": ("static", identity),
        "partitioned, dynamic": ("dynamic", partitioned),
        "partitioned, static": ("static", partitioned),
    }


def decode(
    model: Any, contender: tuple[str, Callable[..., Any]], batch: int, visual: int, steps: int
) -> Iterator[tuple[float, Tensor]]:
    """Seconds and logits of each of ``steps`` steps."""
    kind, forward = contender
    cache = filled(model, kind, batch, visual, steps)
    length = visual + TEXT
    with torch.no_grad(), avl_fx.modality_ids(visual_positions(batch, visual)):
        for step in range(steps):
            token = torch.full((batch, 1), 10 + step)
            mask = torch.ones(batch, length + step + 1, dtype=torch.long)
            start = time.perf_counter()
            logits = forward(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            yield time.perf_counter() - start, logits


def bandwidth() -> float:
    """Bytes a second: the faster of a large copy and a large sum."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        copied = time.perf_counter()
        source.sum()
        summed = time.perf_counter()
        best = max(best, 2 * source.nbytes / (copied - start), source.nbytes / (summed - copied))
    return best


def in_turns(
    model: Any, everyone: Contenders, batch: int, visual: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[Tensor]]]:
    """Seconds of all timed steps, and logits of the last round, by contender."""
    seconds: dict[str, list[float]] = {name: [] for name in everyone}
    logits: dict[str, list[Tensor]] = {}
    for _ in range(ROUNDS):
        for name, contender in everyone.items():
            run = list(decode(model, contender, batch, visual, WARM_UP + steps))
            seconds[name] += [took for took, _ in run[WARM_UP:]]
            logits[name] = [out for _, out in run]
            del run
            gc.collect()
    return seconds, logits


def measure(model: Any, everyone: Contenders, batch: int, visual: int, steps: int) -> dict[str, Any]:
    """One cell of the grid."""
    seconds, logits = in_turns(model, everyone, batch, visual, steps)
    with avl_oracle(
        model,
        visual_positions(batch, visual),
        core=0.3,
        secondary=0.5,
        refresh=REFRESH,
        text=1.0,
        decoder_prefix="model.language_model.layers",
    ):
        oracle = [out for _, out in decode(model, ("dynamic", model.forward), batch, visual, WARM_UP + 2)]

    dense = logits["eager, dynamic"]
    differences = {}
    for name in everyone:
        if "eager" not in name:
            wanted = oracle if name.startswith("partitioned") else dense
            differences[name] = largest_difference(logits[name][: len(wanted)], wanted)
    exact = all(d <= (NEAR_TIE if n.startswith("partitioned") else TOLERANCE) for n, d in differences.items())
    row: dict[str, Any] = {"batch": batch, "visual": visual, "exact": exact, "differences": differences}
    row |= {name: summary(periods(times)) for name, times in seconds.items()}
    if exact:
        speed, baseline = bandwidth(), min((row[n]["median_ms"], n) for n in list(everyone)[:4])
        row["fastest_baseline"] = baseline[1]
        row["bytes_per_second"] = round(speed)
        for name in list(everyone)[4:]:
            plan = PLAN if name.startswith("partitioned") else Plan.identity()
            bound = read_bytes(model, batch, visual, mean_share(plan)) / speed * 1e3
            row[name]["over_baseline"] = round(baseline[0] / row[name]["median_ms"], 3)
            row[name]["of_bound"] = round(row[name]["median_ms"] / bound, 3)
    return row


def main(
    steps: Annotated[int, typer.Option(help="timed decode steps a round, in threes", min=REFRESH)] = 12,
    visual: Annotated[list[int] | None, typer.Option(help="visual tokens")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="rows")] = None,
    kv_heads: Annotated[list[int] | None, typer.Option(help="key/value heads")] = None,
) -> list[dict[str, Any]]:
    """Measure the grid, print a table, save the figures."""
    steps -= steps % REFRESH
    rows: list[dict[str, Any]] = []
    table = Table(title=f"One decode step in ms (over the fastest baseline), {torch.get_num_threads()} threads")
    for heads in kv_heads or KV_HEADS:
        for rows_of_batch in batch or BATCHES:
            torch._dynamo.reset()
            model = llava(layers=LAYERS, hidden=768, heads=12, kv_heads=heads, visual_tokens=576)
            everyone = contenders(model)
            if not rows:
                for column in ("heads", "visual", "batch", *everyone):
                    table.add_column(column, justify="right")
            for tokens in visual or VISUAL:
                row = {"kv_heads": heads} | measure(model, everyone, rows_of_batch, tokens, steps)
                rows.append(row)
                cells = [cell(row[name]) for name in everyone]
                table.add_row(KV_HEADS[heads], str(tokens), str(rows_of_batch), *cells)
                console.print(heads, rows_of_batch, tokens, *cells, "" if row["exact"] else row["differences"])
                saved = save("decode", rows, SIZE)  # what is measured is not lost when the rest cannot be
    console.print(table)
    console.print(f"saved: {saved}")
    if not all(row["exact"] for row in rows):
        raise typer.Exit(1)
    return rows


def cell(figures: dict[str, Any]) -> str:
    """Milliseconds, and the ratio where there is one."""
    ratio = f" ({figures['over_baseline']:.2f}x)" if "over_baseline" in figures else ""
    return f"{figures['median_ms']:.1f}{ratio}"


if __name__ == "__main__":
    typer.run(main)
