"""``python -m benchmarks.eval.overlay``: where core, secondary and minor visual tokens lie on a picture.

One row of panels shows the choice at the end of the prompt, layer by layer; the other how core moves while a long
answer is written. Read from the eager oracle, which the compiled plan equals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor
from transformers import LogitsProcessorList

from avl_fx import Plan
from benchmarks.eval.contenders import partitioned
from benchmarks.eval.page import OVERLAYS, RESULTS
from examples.petite_vlm.data import DATASETS
from examples.petite_vlm.lazy_layers import PREFIX
from examples.petite_vlm.model import READER, load_petite_vlm
from tests.oracle.avl import AvlOracle, avl_oracle

__all__ = ["Choices", "draw", "watch"]

console = Console()
CORE, SECONDARY, MINOR = "#d62728", "#f7b6a0", "#20304a"


@dataclass(frozen=True)
class Choices:
    """What each layer holds of one picture, step by step."""

    core: Tensor
    """bool ``[steps, layers, visual tokens]``; step 0 is the end of the prompt."""
    secondary: Tensor
    """bool ``[layers, visual tokens]``: it stays."""
    answer: str


@torch.no_grad()
def watch(model: Any, processor: Any, picture: Image.Image, question: str, plan: Plan, new_tokens: int) -> Choices:
    """Answer one question under ``plan``, by the oracle, and note every choice."""
    inputs = processor.prepare([picture], [question])
    visual = inputs["input_ids"] == model.config.image_token_id
    vision = plan.vision_policy
    assert vision is not None
    settings = {"core": vision.core, "secondary": vision.secondary, "refresh": vision.refresh, "text": 1.0}
    seen: list[Tensor] = []
    with avl_oracle(model, visual, decoder_prefix=PREFIX, **settings) as oracle:  # type: ignore[arg-type]

        def note(ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(_of(oracle, visual, "core"))
            return scores

        out = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, logits_processor=LogitsProcessorList([note])
        )
        secondary = _of(oracle, visual, "secondary")
    return Choices(torch.stack(seen), secondary, processor.decode(out, inputs["input_ids"].shape[1])[0])


def _of(oracle: AvlOracle, visual: Tensor, name: str) -> Tensor:
    """bool ``[layers, visual tokens]``"""
    masks = [getattr(oracle.layers[layer], name)[0, 0, : visual.shape[1]] for layer in sorted(oracle.layers)]
    return torch.stack(masks)[:, visual[0]].clone()


def draw(picture: Image.Image, question: str, found: Choices, layers: Sequence[int], steps: Sequence[int]) -> Any:
    """A matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = 1 + max(len(layers), len(steps))
    figure = Figure(figsize=(2.1 * columns, 5.4), layout="constrained")
    axes = figure.subplots(2, columns)
    for axis in axes.flat:
        axis.set_axis_off()
    side = round(found.secondary.shape[1] ** 0.5)
    width, height = picture.size
    shown = np.asarray(picture.convert("RGB"))
    for axis in axes[:, 0]:
        axis.imshow(shown)
    axes[0, 0].set_title(question, fontsize=8, loc="left")
    answer = found.answer if len(found.answer) <= 60 else found.answer[:57] + "..."
    axes[1, 0].set_title(answer, fontsize=6, loc="left", wrap=True)

    def over(axis: Any, values: np.ndarray, colour: str, strength: float) -> None:
        grid = np.zeros((side, side, 4))
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        grid[..., :3] = red, green, blue
        grid[..., 3] = values.reshape(side, side) * strength
        axis.imshow(grid, extent=(0, width, height, 0), interpolation="nearest")

    for axis, layer in zip(axes[0, 1:], layers, strict=False):
        axis.imshow(shown)
        core, secondary = found.core[0, layer].numpy(), found.secondary[layer].numpy()
        over(axis, (~secondary).astype(float), MINOR, 0.75)
        over(axis, (secondary & ~core).astype(float), SECONDARY, 0.45)
        over(axis, core.astype(float), CORE, 0.55)
        axis.set_title(f"layer {layer}", fontsize=8)
    for axis, step in zip(axes[1, 1:], steps, strict=False):
        axis.imshow(shown)
        over(axis, found.core[step].float().mean(0).numpy(), CORE, 0.95)
        axis.set_title(f"core after {step} tokens, mean over layers", fontsize=6)
    names = [Patch(color=c, label=n) for c, n in ((CORE, "core"), (SECONDARY, "secondary"), (MINOR, "minor"))]
    figure.legend(handles=names, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def main(
    dataset: Annotated[str, typer.Option(help="one of the data sets")] = "scenes",
    image: Annotated[int, typer.Option(help="number of the held-out picture")] = 0,
    share: Annotated[float, typer.Option(help="of the visual tokens that is kept")] = 0.3,
    new_tokens: int = 64,
    adapter: Annotated[Path, typer.Option(help="the adapter file")] = READER,
    output: Annotated[Path | None, typer.Option(help="the picture to write")] = None,
) -> None:
    """Draw the choices for the first question about a held-out picture."""
    if dataset not in DATASETS:
        raise typer.BadParameter(f"{dataset} is no data set: choose among {', '.join(DATASETS)}")
    model, processor = load_petite_vlm(adapter)
    picture, question = DATASETS[dataset].picture("test", image), DATASETS[dataset].questions("test", image)[0]
    found = watch(model, processor, picture, question.text, partitioned(share), new_tokens)
    count, steps = found.core.shape[1], found.core.shape[0]
    layers = [round(i * (count - 1) / 5) for i in range(6)]
    moments = sorted({round(i * (steps - 1) / 5) for i in range(6)})
    path = output or RESULTS / OVERLAYS / f"{dataset}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, question.text, found, layers, moments).savefig(path, dpi=120)
    console.print(f"{question.text} {found.answer!r} (expected {question.answer!r}); saved {path}")


if __name__ == "__main__":
    typer.run(main)
