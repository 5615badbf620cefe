"""How near to the time that memory needs a decode step can come on a CPU, and what stands between.

The bound of `benchmarks.decode` is the time to read weights and rows of the cache once, at the speed of a large copy or
sum. A step reads them in pieces, one after another, since each layer waits for the one before. So beside the step
stand, measured in turns: the same bytes read by a loop that does nothing else, in one piece, in the step's pieces with
one parallel region for all and with one for each; all linear layers; all attention. What is left of the step is
everything else: norms, rotary embeddings, activations, refreshes, Python.

How much of that is no compiler's to win is shown by a model of as many layers with next to nothing in them (hidden size
48, 64 visual tokens): what its step takes is Python, guards and calls, ours and under Inductor alone.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from avl_fx.kernels.native import bind
from benchmarks import decode
from benchmarks._decoding import PLAN, TEXT, mean_share
from benchmarks._models import llava
from benchmarks._report import console, save

VISUAL = 2880
ROUNDS = 5
LARGE = 2**40
STEP = "the step"
WAYS = ("in one piece", "pieces, one region", "pieces, a region each", "linear layers", "attention")
EMPTY = ("an empty step", "an empty step, Inductor")
SMALL_HIDDEN, SMALL_VISUAL = 48, 64


def reader(arrays: Sequence[Tensor], together: bool) -> Callable[[], Tensor]:
    """Reads float32 arrays; gives the sum of each."""
    function = bind(Path(__file__).with_name("reading.cpp"), "avl_read", [*[ctypes.c_void_p] * 3, ctypes.c_int64 * 3])
    if function is None:
        raise RuntimeError("no C++ compiler to build the reader with. Fix: install g++, or name one in CXX.")
    threads = torch.get_num_threads()
    pointers = (ctypes.c_void_p * len(arrays))(*[array.data_ptr() for array in arrays])
    counts = (ctypes.c_int64 * len(arrays))(*[array.numel() for array in arrays])
    totals = torch.zeros(len(arrays), threads)
    sizes = (ctypes.c_int64 * 3)(len(arrays), threads, together)

    def read() -> Tensor:
        function(pointers, counts, totals.data_ptr(), sizes)
        return totals.sum(1)

    read.keeps = arrays  # type: ignore[attr-defined]  # their memory has to outlive the pointers
    return read


def ways(model: Any, batch: int, visual: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """What is timed beside the step, by name, each found to do what it says; and the bytes that each of them reads."""
    decoder = [*model.model.language_model.layers, model.lm_head]
    weights = [p.detach() for part in decoder for p in part.parameters() if p.dim() == 2]
    text = model.config.get_text_config()
    heads, kv_heads, dim = (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.hidden_size // text.num_attention_heads,
    )
    rows = TEXT + round(mean_share(PLAN) * visual)
    caches = [[torch.randn(batch, kv_heads, TEXT + visual, dim) for _ in "kv"] for _ in range(text.num_hidden_layers)]
    read = [array[:, :, :rows].contiguous() for pair in caches for array in pair]
    pieces = [*weights, *read]
    whole = torch.cat([piece.flatten() for piece in pieces])
    given = {width: torch.randn(batch, 1, width) for width in {w.shape[1] for w in weights}}
    query = torch.randn(batch, heads, 1, dim)
    ranges = torch.tensor([[[0, rows - TEXT // 2], [TEXT // 2 + visual, LARGE]]]).repeat(batch, 1, 1)
    found: dict[str, Callable[[], Any]] = {
        "in one piece": reader([whole], together=True),
        "pieces, one region": reader(pieces, together=True),
        "pieces, a region each": reader(pieces, together=False),
        "linear layers": lambda: [torch.ops.avl.narrow_linear(given[w.shape[1]], w, None) for w in weights],
        "attention": lambda: [
            torch.ops.avl.partitioned_decode(query, k, v, None, None, None, ranges, None, dim**-0.5)[0]
            for k, v in caches
        ],
    }
    sums = torch.stack([piece.double().sum() for piece in pieces])
    for name in WAYS[1:3]:
        torch.testing.assert_close(found[name]().double(), sums, atol=1.0, rtol=1e-3)
    for product, weight in zip(found["linear layers"](), weights, strict=True):
        torch.testing.assert_close(product, given[weight.shape[1]] @ weight.t(), atol=1e-3, rtol=1e-3)
    return found, float(whole.nbytes)


def measure(model: Any, forward: Any, batch: int, visual: int, steps: int) -> dict[str, Any]:
    """Medians over rounds in which everything takes its turn, in milliseconds; and the bound of each round."""
    found, size = ways(model, batch, visual)
    taken: dict[str, list[float]] = {name: [] for name in ("bound", *WAYS, STEP)}
    for turn in range(ROUNDS):
        taken["bound"].append(size / decode.bandwidth())
        for name, way in found.items():
            way()
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
        run = decode.decode(model, ("dynamic", forward), batch, visual, decode.WARM_UP + steps)
        own = [seconds for seconds, _ in run][decode.WARM_UP :]
        if turn:  # the first one compiles
            taken[STEP].append(statistics.mean(own))
    row: dict[str, Any] = {"batch": batch, "visual": visual, "bytes": size}
    row |= {name: round(1e3 * statistics.median(times), 3) for name, times in taken.items()}
    return row


def empty_steps(kv_heads: int, batch: int, steps: int) -> dict[str, float]:
    """Milliseconds of a decode step of a model with as many layers and heads, and next to nothing to compute.

    Ours are of a step that does not refresh: there would be rows to move.
    """
    model = llava(layers=decode.LAYERS, hidden=SMALL_HIDDEN, heads=12, kv_heads=kv_heads, visual_tokens=SMALL_VISUAL)
    found = {}
    for name, forward in zip(EMPTY, (partitioned(model), torch.compile(model.forward)), strict=True):
        runs = [
            list(decode.decode(model, ("dynamic", forward), batch, SMALL_VISUAL, decode.WARM_UP + steps))
            for _ in range(2)  # the first one compiles
        ]
        found[name] = round(1e3 * statistics.median(seconds for seconds, _ in runs[1][decode.WARM_UP :]), 3)
    return found


def partitioned(model: Any) -> Callable[..., Any]:
    """The model's forward under the plan of these benchmarks."""
    compiled: Callable[..., Any] = torch.compile(model.forward, backend="avl", options={"plan": PLAN, "strict": True})
    return compiled


def main(
    steps: Annotated[int, typer.Option(help="decode steps a round, in threes: every third refreshes", min=3)] = 12,
    visual: Annotated[int, typer.Option(help="visual tokens")] = VISUAL,
    batch: Annotated[list[int] | None, typer.Option(help="rows")] = None,
    kv_heads: Annotated[list[int] | None, typer.Option(help="key/value heads")] = None,
) -> list[dict[str, Any]]:
    """Measure, print a table, save the figures."""
    table = Table(title=f"ms (times the bound), {visual} visual tokens, {torch.get_num_threads()} threads")
    for column in ("heads", "batch", "bound", *WAYS, STEP, *EMPTY):
        table.add_column(column, justify="right")
    rows = []
    for heads in kv_heads or decode.KV_HEADS:
        for rows_of_batch in batch or decode.BATCHES:
            torch._dynamo.reset()
            model = llava(layers=decode.LAYERS, hidden=768, heads=12, kv_heads=heads, visual_tokens=576)
            with torch.no_grad():
                row = {"kv_heads": heads} | measure(model, partitioned(model), rows_of_batch, visual, steps)
                torch._dynamo.reset()
                row |= empty_steps(heads, rows_of_batch, steps)
            rows.append(row)
            shown = [f"{row[name]:.1f} ({row[name] / row['bound']:.2f}x)" for name in (*WAYS, STEP, *EMPTY)]
            table.add_row(decode.KV_HEADS[heads], str(rows_of_batch), f"{row['bound']:.1f}", *shown)
    console.print(table)
    console.print(f"saved: {save('bound', rows, decode.SIZE)}")
    return rows


if __name__ == "__main__":
    typer.run(main)
