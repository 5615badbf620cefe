"""Prompts and decode steps in half precision under the identity plan, on a processor without instructions for it.

`python -m benchmarks.half_precision`. 8 layers x 768, 12 query and 4 key/value heads, prompts of 576 visual tokens. A
ratio is printed only if the logits of prompt and steps are as near to those of the same weights in float32 as eager's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from avl_fx.kernels.narrow_linear import pays
from benchmarks._decoding import TEXT
from benchmarks._models import llava
from benchmarks._report import console, save, summary

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BATCHES = (1, 4)
VISUAL, LAYERS = 576, 8
BASELINES = ("eager", "Inductor")
AS_NEAR = 1.25
"""Times eager's mean error."""
WARM_UP = 2
"""Prompts, and steps behind each, that compile."""


def contenders(model: Any) -> dict[str, Callable[..., Any]]:
    return {
        "eager": model.forward,
        "Inductor": torch.compile(model.forward),
        "identity": torch.compile(model.forward, backend="avl", options={"strict": True}),
    }


@torch.no_grad()
def answer(model: Any, forward: Callable[..., Any], prompt: Tensor, steps: int) -> tuple[list[float], list[Tensor]]:
    """Seconds and last logits of the prompt and of each of ``steps`` steps behind it."""
    cache, seconds, logits = DynamicCache(config=model.config.get_text_config()), [], []
    more = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    for step in range(1 + steps):
        given = {"input_ids": torch.full((len(prompt), 1), 9 + step)} if step else {"inputs_embeds": prompt}
        start = time.perf_counter()
        out = forward(**given, **more).logits[:, -1]
        seconds.append(time.perf_counter() - start)
        logits.append(out)
    return seconds, logits


def measure(dtype: torch.dtype, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """One dtype and size."""
    torch._dynamo.reset()
    model = llava(layers=LAYERS, hidden=768, heads=12, kv_heads=4, visual_tokens=VISUAL, dtype=dtype)
    prompt = torch.randn(batch, VISUAL + TEXT, 768, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = answer(wide := copy.deepcopy(model).float(), wide.forward, prompt.float(), steps)[1]
    times: dict[str, tuple[list[float], list[float]]] = {}
    errors: dict[str, float] = {}
    everyone = contenders(model)
    for turn in range(WARM_UP + rounds):
        for name, forward in everyone.items():
            seconds, logits = answer(model, forward, prompt, steps)
            errors[name] = sum((a.float() - b).abs().mean().item() for a, b in zip(logits, exact, strict=True))
            if turn >= WARM_UP:
                prompts, later = times.setdefault(name, ([], []))
                prompts.append(seconds[0])
                later += seconds[1 + WARM_UP :]
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "batch": batch, "errors": errors}
    row["exact"] = errors["identity"] <= AS_NEAR * errors["eager"]
    for at, part in enumerate(("prompt", "step")):
        row[part] = {name: summary(both[at]) for name, both in times.items()}
        best = min(row[part][name]["median_ms"] for name in BASELINES)
        if row["exact"]:
            row[part]["identity"]["over_baseline"] = round(best / row[part]["identity"]["median_ms"], 3)
    return row


def main(
    rounds: Annotated[int, typer.Option(help="timed prompts of each", min=2)] = 2,
    steps: Annotated[int, typer.Option(help="decode steps behind each prompt", min=WARM_UP + 1)] = 8,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="rows")] = None,
) -> list[dict[str, Any]]:
    """Measure, print a table, save the figures."""
    table = Table("dtype", "batch", "", *BASELINES, "identity", "gain", title=f"ms, {torch.get_num_threads()} threads")
    rows: list[dict[str, Any]] = []
    for name, dtype in DTYPES.items():
        if not pays(dtype):
            console.print(f"{name} is left to ATen: this processor has instructions for it")
            continue
        for batch in batches or BATCHES:
            row = measure(dtype, batch, rounds, steps)
            rows.append(row)
            saved = save("half_precision", rows, ("dtype", "batch"))
            for part in ("prompt", "step"):
                cells = [f"{row[part][who]['median_ms']:.1f}" for who in (*BASELINES, "identity")]
                gain = row[part]["identity"].get("over_baseline")
                table.add_row(name, str(batch), part, *cells, f"{gain:.2f}x" if gain else "not equal")
    if rows:
        console.print(table)
        console.print(f"saved: {saved}")
    if not all(row["exact"] for row in rows):
        raise typer.Exit(1)
    return rows


if __name__ == "__main__":
    typer.run(main)
