"""Lazy plans for the model of all data sets, one a mode, calibrated on training pictures of each.

    python -m examples.petite_vlm.mixture_plans

writes ``plans/lazy_35_<mode>.json``: blocks that save 35% of the KV bytes where lazy layers store no keys, as in the
paper (arXiv 2602.01901). `train --plan` trains under them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console

import avl_fx
from avl_fx import Plan

from .data import DATASETS
from .lazy_layers import Mode
from .model import READER, load_petite_vlm
from .processor import PetiteProcessor

console = Console()
PLANS = Path(__file__).parent / "plans"


def training_prompts(
    processor: PetiteProcessor, name: str, images: int, batch: int = 8
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Batches of one question each about the first training pictures of a data set."""
    dataset = DATASETS[name]
    for start in range(0, images, batch):
        chosen = range(start, min(start + batch, images))
        pictures = [dataset.picture("train", image) for image in chosen]
        yield processor.prepare(pictures, [dataset.questions("train", image)[0].text for image in chosen])


def main(
    kv_saving: Annotated[float, typer.Option(help="share of the KV bytes that lazy layers save in mode gla")] = 0.35,
    images: Annotated[int, typer.Option(help="training pictures of each data set")] = 12,
    adapter: Path = READER,
    output: Annotated[Path, typer.Option(help="folder for the plans")] = PLANS,
) -> None:
    """Calibrate once, and write the blocks in every mode."""
    model, processor = load_petite_vlm(adapter)
    batches: list[Any] = [b for name in DATASETS for b in training_prompts(processor, name, images, batch=12)]
    plan = avl_fx.calibrate(model, batches, kv_saving=kv_saving)
    assert plan.lazy_policy is not None
    for mode in get_args(Mode):
        path = output / f"lazy_{round(100 * kv_saving)}_{mode}.json"
        Plan.lazy(plan.lazy_policy.blocks, mode, num_layers=plan.num_layers, description=plan.description).to_json(path)
        console.print(f"{path}: {plan.lazy_policy.blocks}")


if __name__ == "__main__":
    typer.run(main)
