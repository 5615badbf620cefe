"""Teach the projector what each patch shows, before any language model looks: `python -m examples.petite_vlm.align`.

Pictures that are made know what is where. So a patch can be told directly: look like the embedding of "cat", and of
"top" and "left". The projector learns that in minutes, without the decoder, whose part is then to find and to copy
what is there already, in words that it knows. `train --start` goes on from the file. With `--start` the projector of an
adapter learns more, and its decoder stays: what it reads still looks as it did, only clearer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from .data import LOCATED, Split
from .features import encode
from .labels import GROUPS, WordDirections, patch_targets
from .model import load_petite_vlm, read_adapter, trained_at
from .parts import sha256_of
from .processor import PetiteProcessor, to_pixels
from .trainer import init_projector

console = Console()
NONE_WEIGHT = 0.3
"""Of a patch that shows nothing of a group; rows and columns speak of every patch."""
SAID_WEIGHT = {"letter": 6.0, "digit": 6.0, "name": 2.0}
"""By group, how much more often a patch is drawn that shows something of it."""


@dataclass(frozen=True)
class Alignment:
    """All that decides the result, besides the data and the parts."""

    pictures: str = "sheets:1200,scenes:900,words:300,documents:500"
    image_size: int = 224  # pixels
    feature_layers: tuple[int, ...] = (4, -3)  # of the vision encoder: strokes, and things
    steps: int = 3000
    patches: int = 4096  # a step
    rate: float = 2e-3
    noise: float = 0.1  # on features, in standard deviations of each
    decay: float = 0.05
    length: float = 0.02  # penalty on squared length, where one word is 1
    seed: int = 0
    start: str = ""  # sha256 of the adapter whose projector learns more


@dataclass(frozen=True)
class Patches:
    """Features ``[N, width]`` float16, and by group targets ``[N, words + 1]`` float16."""

    features: torch.Tensor
    targets: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls, model: LlavaForConditionalGeneration, name: str, split: Split, count: int, size: int, at_once: int = 8
    ) -> Patches:
        """Those of the first pictures of a data set."""
        data, side = LOCATED[name], size // 14
        features: list[torch.Tensor] = []
        targets: dict[str, list[torch.Tensor]] = {group: [] for group in GROUPS}
        for start in track(range(0, count, at_once), description=f"{name}, {split}", console=console):
            numbers = range(start, min(count, start + at_once))
            pixels = to_pixels([data.picture(split, number) for number in numbers], size)
            features.append(encode(model, pixels).flatten(0, 1).half())
            for number in numbers:
                for group, share in patch_targets(data.regions(split, number), side).items():
                    targets[group].append(share.half())
        return cls(torch.cat(features), {group: torch.cat(shares) for group, shares in targets.items()})

    @classmethod
    def joined(cls, some: Sequence[Patches]) -> Patches:
        """All of them, in order."""
        targets = {group: torch.cat([part.targets[group] for part in some]) for group in GROUPS}
        return cls(torch.cat([part.features for part in some]), targets)


def alignment_loss(directions: WordDirections, x: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy summed over groups, for ``x`` ``[N, width]``."""
    total = x.new_zeros(())
    for group, scores in directions(x).items():
        target = targets[group].float()
        weight = 1 - (1 - NONE_WEIGHT) * target[:, -1]
        total = total + (nn.functional.cross_entropy(scores, target, reduction="none") * weight).sum() / weight.sum()
    return total


@torch.no_grad()
def recognised(directions: WordDirections, projector: nn.Module, patches: Patches) -> dict[str, dict[str, float]]:
    """By group that occurs: of patches that show something the share whose word is right (``word``) and is also said
    (``said``), and of the others the share of which something is said (``false``)."""
    scores = directions(projector(patches.features.float()))
    found: dict[str, dict[str, float]] = {}
    for group, target in patches.targets.items():
        shows = target[:, -1] == 0
        if not shows.any():
            continue
        best, word = scores[group].argmax(1), scores[group][:, :-1].argmax(1)
        right = [target.gather(1, choice[:, None])[shows] > 0 for choice in (word, best)]
        found[group] = {"word": right[0].float().mean().item(), "said": right[1].float().mean().item()}
        if not shows.all():
            found[group]["false"] = (best[~shows] != target.shape[1] - 1).float().mean().item()
    return found


def align(
    model: LlavaForConditionalGeneration, processor: PetiteProcessor, recipe: Alignment, patches: Patches
) -> tuple[WordDirections, list[float]]:
    """Train the model's projector in place, from the beginning where the recipe has no start; returns what scores it,
    and the loss of every step."""
    torch.manual_seed(recipe.seed)
    embedding = model.get_input_embeddings().weight.detach()
    projector = model.model.multi_modal_projector.requires_grad_(True)
    # The file is in order of data sets: a stride shows all of them.
    sample = patches.features[:: max(1, len(patches.features) // 20_000)].float()
    if not recipe.start:
        init_projector(projector, sample[None], float(embedding.std()))
    spread = sample.std(0)
    directions = WordDirections(processor.tokenizer, embedding)
    often = torch.ones(len(patches.features))
    for group, more in SAID_WEIGHT.items():
        often += more * (patches.targets[group][:, -1] == 0)
    trained = [*projector.parameters(), *directions.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.decay)
    curve = []
    for step in track(range(recipe.steps), description="aligning", console=console):
        factor = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for parameters in optimizer.param_groups:
            parameters["lr"] = recipe.rate * factor
        some = torch.randint(len(often), (4 * recipe.patches,))
        some = some[torch.multinomial(often[some], recipe.patches)]
        seen = patches.features[some].float()
        x = projector(seen + recipe.noise * spread * torch.randn_like(seen))
        loss = alignment_loss(directions, x, {group: share[some] for group, share in patches.targets.items()})
        loss = loss + recipe.length * directions.length(x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
        if not console.is_terminal and step % 200 == 199:
            console.print(f"step {step + 1}: loss {sum(curve[-200:]) / 200:.3f}")
    projector.requires_grad_(False)
    return directions, curve


def main(
    out: Annotated[Path, typer.Option(help="the projector, for train --start")] = Path("out/aligned.safetensors"),
    pictures: Annotated[str, typer.Option(help="data sets and how many pictures of each")] = Alignment.pictures,
    image_size: Annotated[int, typer.Option(help="pixels, a multiple of 14; not with --start")] = Alignment.image_size,
    feature_layers: Annotated[
        str, typer.Option(help="layers of the vision encoder, side by side; not with --start")
    ] = ",".join(map(str, Alignment.feature_layers)),
    start: Annotated[Path | None, typer.Option(help="an adapter whose projector learns more")] = None,
    steps: int = Alignment.steps,
    rate: Annotated[float, typer.Option(help="of learning, at its height")] = Alignment.rate,
    seed: int = Alignment.seed,
    held_out: Annotated[int, typer.Option(help="test pictures of each data set")] = 96,
) -> None:
    """Align the projector, and say what it recognises on held-out pictures."""
    layers = tuple(int(layer) for layer in feature_layers.split(","))
    if start is not None:
        image_size, layers = trained_at(start)
    recipe = Alignment(
        pictures=pictures,
        image_size=image_size,
        feature_layers=layers,
        steps=steps,
        rate=rate,
        seed=seed,
        start="" if start is None else sha256_of(start),
    )
    counts = {name: int(count) for name, _, count in (item.partition(":") for item in pictures.split(","))}
    if unknown := counts.keys() - LOCATED.keys():
        raise typer.BadParameter(f"{min(unknown)!r} does not say where things are: choose among {', '.join(LOCATED)}")
    # Whoever starts from an adapter needs nothing of its decoder here: words are where they always were.
    model, processor = load_petite_vlm(start, image_size=image_size, feature_layers=layers)
    model.requires_grad_(False)
    began = time.perf_counter()
    with torch.no_grad():
        train = Patches.joined([Patches.of(model, name, "train", count, image_size) for name, count in counts.items()])
        test = {name: Patches.of(model, name, "test", held_out, image_size) for name in counts}
    encoded = time.perf_counter()
    directions, curve = align(model, processor, recipe, train)
    seconds = {"pictures": encoded - began, "training": time.perf_counter() - encoded}
    projector = model.model.multi_modal_projector
    found = {name: recognised(directions, projector, patches) for name, patches in test.items()}
    for name, groups in found.items():
        for group, shares in groups.items():
            console.print(f"{name} {group}: " + ", ".join(f"{key} {share:.1%}" for key, share in shares.items()))
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors, scale = ({}, 1.0) if start is None else read_adapter(start)
    tensors |= {f"projector.{name}": p.detach().half().contiguous() for name, p in projector.named_parameters()}
    recipe_text = json.dumps(asdict(recipe))
    save_file(tensors, out, metadata={"format": "pt", "lora_scale": str(scale), "recipe": recipe_text})
    described = {"sha256": sha256_of(out), "recipe": asdict(recipe), "seconds": seconds, "held_out": found}
    described["loss"] = [round(sum(curve[i : i + 100]) / len(curve[i : i + 100]), 4) for i in range(0, len(curve), 100)]
    out.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
