"""What an adapter answers of every data set's held-out pictures, written beside it.

`python -m examples.petite_vlm.describe ADAPTER`. An answer counts when greedy decoding would give it whole: every token
of it, the end included, is the most likely one after those before. Packed, so that all questions about a picture share
its image tokens (`packing.py`). An adapter that was trained under plans answers under each of them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlavaForConditionalGeneration

from avl_fx import Plan

from .data import DATASETS
from .model import load_petite_vlm, recipe_of, trained_under
from .packing import loss_and_hits, pack, packed_logits
from .parts import sha256_of
from .sources import Mixture
from .under_plans import in_mode, under_plans

console = Console()
Shares = dict[str, dict[str, float]]
"""By kind of question: how many there are (``questions``), and shares of them."""


@torch.no_grad()
def answered(
    model: LlavaForConditionalGeneration, mixture: Mixture, name: str, images: int, rows_at_once: int = 4
) -> Shares:
    """By kind of question of a data set: the share answered with its own picture, and with the next one's."""
    hits: dict[str, list[list[bool]]] = defaultdict(list)
    right: dict[str, list[float]] = defaultdict(list)
    rows = [mixture.row(name, image)[1] for image in range(images)]
    for start in track(range(0, images, rows_at_once), description=name, console=console):
        numbers = range(start, min(images, start + rows_at_once))
        batch = pack([rows[n] for n in numbers], mixture.prefix)
        both = []
        for shift in (0, 1):
            features = mixture.features([(name, (n + shift) % images) for n in numbers])
            logits = packed_logits(model, batch, features, model.config.image_token_id)
            both.append(loss_and_hits(logits, batch)[1].tolist())
            if not shift:
                tokens = (logits.argmax(-1) == batch.targets).float()
        for place, question in enumerate(batch.questions):
            for kind in ("all", question.kind):
                hits[kind].append([both[0][place], both[1][place]])
                right[kind].append(tokens[batch.owner == place].mean().item())
    found: Shares = {}
    for kind, pairs in hits.items():
        own, other = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
        tokens_right = sum(right[kind]) / len(right[kind])
        shares = {"right": own, "another image": other, "tokens": tokens_right}
        found[kind] = {"questions": len(pairs)} | {key: round(value, 4) for key, value in shares.items()}
    return found


def main(
    adapter: Annotated[Path, typer.Argument(help="the adapter file")],
    images: Annotated[int, typer.Option(help="held-out pictures of each data set")] = 48,
    data: Annotated[str, typer.Option(help="data sets")] = ",".join(DATASETS),
) -> None:
    """Ask everything about held-out pictures, and record what was right."""
    model, processor = load_petite_vlm(adapter)
    names = data.split(",")
    mixture = Mixture(model, processor, dict.fromkeys(names, 1.0), 1, 1, 0, split="test")
    plans = trained_under(adapter)
    found: dict[str, Shares] = {}
    for plan, student in zip(plans or [Plan.identity()], under_plans(model, plans), strict=True):
        found |= {f"{name}{in_mode(plan)}": answered(student, mixture, name, images) for name in names}
    table = Table("data set", "kind", "questions", "right", "another image", "answer tokens")
    for name, kinds in found.items():
        for kind, share in kinds.items():
            shown = [f"{share[key]:.1%}" for key in ("right", "another image", "tokens")]
            table.add_row(name, kind, str(share["questions"]), *shown)
    console.print(table)
    described = {
        "sha256": sha256_of(adapter),
        "bytes": adapter.stat().st_size,
        "recipe": recipe_of(adapter),
        "held_out": {
            "how": "greedy, exact match of whole answers, float32",
            "image_tokens": processor.image_tokens,
            "images": images,
            "found": found,
        },
    }
    adapter.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
