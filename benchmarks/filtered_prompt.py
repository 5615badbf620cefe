"""Prompts that drop half of their visual tokens behind layer 2 (plan section ``prefill``), beside whole ones.

Time to the first token: `python -m benchmarks.filtered_prompt`. A ratio is printed only if the filtered prompt gives
the logits of the method written out in eager PyTorch (`filtered_eagerly`, one decoder layer after the other), and the
whole ones those of the eager model.
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
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import avl_fx
from avl_fx import AVLCache, Plan
from benchmarks._decoding import TEXT, visual_positions
from benchmarks._models import llava
from benchmarks._report import console, save, summary

SIZES = ((1, 576), (4, 576), (1, 2880))
"""Batch and visual tokens."""
LAYERS, KEEP, AFTER = 16, 0.5, 2
WHOLE = Plan.avl(0.3, 0.5, 3, text=None)
FILTERED = Plan.avl(0.3, 0.5, 3, text=None, prefill=KEEP, prefill_after_layer=AFTER)
BASELINES = ("eager", "Inductor")
TOLERANCE = 2e-3
WARM_UP = 2
"""Prompts of each that compile."""


@torch.no_grad()
def filtered_eagerly(model: Any, embeddings: Tensor, visual: Tensor) -> Tensor:
    """Logits ``[batch, vocabulary]`` of a prompt, the visual tokens that its last row attends to least dropped.

    Args:
        model: a LLaVA with a Llama decoder.
        embeddings: ``[batch, tokens, hidden]``, without padding.
        visual: bool ``[batch, tokens]``, equally many in each row.
    """
    decoder, hidden = model.model.language_model, embeddings
    positions = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
    for number, layer in enumerate(decoder.layers):
        rotation = decoder.rotary_emb(hidden, positions)
        if number == AFTER:
            scores = last_row(layer.self_attn, layer.input_layernorm(hidden), rotation)
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotation)
        if number == AFTER:
            count = int(visual[0].sum())
            lost = scores.masked_fill(~visual, torch.inf).topk(count - int(KEEP * count), largest=False).indices
            kept = torch.ones_like(visual).scatter(1, lost, False).nonzero()[:, 1].view(len(hidden), -1)
            hidden = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[2]))
            positions = kept
    return model.lm_head(decoder.norm(hidden[:, -1]))


def last_row(attention: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """What the last token attends to, ``[batch, tokens]``, the mean over heads."""
    query, key = (
        projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotation)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query[:, :, -1:] @ key.transpose(2, 3) * attention.scaling).softmax(-1).mean((1, 2))


def contenders(model: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> logits ``[batch, vocabulary]`` of the prompt's last token, on a cache of its own."""
    config = model.config.get_text_config()

    def prompt(forward: Any, cache: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
        def run(embeddings: Tensor) -> Tensor:
            more = {"past_key_values": cache(), "use_cache": True, "logits_to_keep": 1}
            return forward(inputs_embeds=embeddings, **more).logits[:, -1]

        return run

    def stock() -> DynamicCache:
        return DynamicCache(config=config)

    whole, filtered = (avl_fx.compile(copy.deepcopy(model), plan) for plan in (WHOLE, FILTERED))
    return {
        "eager": prompt(model, stock),
        "Inductor": prompt(torch.compile(copy.deepcopy(model).forward), stock),
        "A-VL, whole": prompt(whole, lambda: AVLCache(WHOLE, model.config)),
        "A-VL, filtered": prompt(filtered, lambda: AVLCache(FILTERED, model.config)),
        "filtered, eager": lambda embeddings: filtered_eagerly(model, embeddings, visual_of(embeddings)),
    }


def visual_of(embeddings: Tensor) -> Tensor:
    return visual_positions(len(embeddings), embeddings.shape[1] - TEXT)


@torch.no_grad()
def measure(model: Any, batch: int, visual: int, rounds: int) -> dict[str, Any]:
    """One size."""
    hidden, generator = model.config.get_text_config().hidden_size, torch.Generator().manual_seed(2)
    embeddings = torch.randn(batch, visual + TEXT, hidden, generator=generator)
    everyone, logits = contenders(model), {}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    with avl_fx.modality_ids(visual_of(embeddings)):
        for turn in range(WARM_UP + rounds):
            for name, run in everyone.items():
                start = time.perf_counter()
                logits[name] = run(embeddings)
                if turn >= WARM_UP:
                    times[name].append(time.perf_counter() - start)
    filtered = {"A-VL, filtered"}
    differences = {
        name: (found - logits["filtered, eager" if name in filtered else "eager"]).abs().max().item()
        for name, found in logits.items()
        if name not in ("eager", "filtered, eager")
    }
    row: dict[str, Any] = {"batch": batch, "visual": visual, "differences": differences}
    row["exact"] = all(found <= TOLERANCE for found in differences.values())
    row["dropping_changes"] = (logits["filtered, eager"] - logits["eager"]).abs().max().item()
    row |= {name: summary(seconds) for name, seconds in times.items()}
    row["fastest_baseline"] = min(BASELINES, key=lambda name: row[name]["median_ms"])
    for name in everyone if row["exact"] else ():
        row[name]["over_baseline"] = round(row[row["fastest_baseline"]]["median_ms"] / row[name]["median_ms"], 3)
    return row


def main(rounds: Annotated[int, typer.Option(help="timed prompts of each", min=2)] = 4) -> list[dict[str, Any]]:
    """Measure, print a table, save the figures."""
    table = Table(
        title=f"A prompt in ms (over the fastest baseline), {LAYERS} layers, {torch.get_num_threads()} threads"
    )
    rows = []
    for batch, visual in SIZES:
        torch._dynamo.reset()
        model = llava(layers=LAYERS, hidden=768, heads=12, kv_heads=12, visual_tokens=576).eval()
        row = measure(model, batch, visual, rounds)
        rows.append(row)
        names = [name for name in row if isinstance(row[name], dict) and "median_ms" in row[name]]
        if not table.columns:
            for column in ("visual", "batch", *names):
                table.add_column(column, justify="right")
        if not row["exact"]:
            console.print(f"[red]not equal: {row['differences']}")
            continue
        cells = [f"{row[name]['median_ms']:.0f} ({row[name]['over_baseline']:.2f}x)" for name in names]
        table.add_row(str(visual), str(batch), *cells)
    console.print(table)
    console.print(f"saved: {save('filtered_prompt', rows)}")
    if not all(row["exact"] for row in rows):
        raise typer.Exit(1)
    return rows


if __name__ == "__main__":
    typer.run(main)
