"""What the frozen vision encoder sees, computed once and kept as a memory-mapped float16 file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import LlavaForConditionalGeneration

from .data import Split, open_image
from .parts import build_once
from .processor import to_pixels

COUNTS = {"train": 4000, "test": 1000}


@torch.no_grad()
def encode(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the projector of the stock model is given: [B, 3, S, S] -> [B, (S/14)^2, 384 a feature layer].

    The CLS token is dropped.
    """
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    return torch.cat([hidden[layer][:, 1:] for layer in feature_layers(model)], dim=-1)


def feature_layers(model: LlavaForConditionalGeneration) -> list[int]:
    """The layers of the vision encoder that the projector is given."""
    layers = model.config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)


def image_features(
    model: LlavaForConditionalGeneration, root: Path, split: Split, size: int = 168, batch: int = 50
) -> np.ndarray:
    """Features of all images of a split: [images, (size/14)^2, 384 a feature layer] float16, read-only.

    They are indexed by image number.
    """
    count, layers = COUNTS[split], feature_layers(model)

    def build(folder: Path) -> None:
        shape = (count, (size // 14) ** 2, len(layers) * model.config.vision_config.hidden_size)
        out = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float16, shape=shape)
        for start in track(range(0, count, batch), description=f"encoding {split} images"):
            images = [open_image(root, split, i) for i in range(start, min(start + batch, count))]
            pixels = to_pixels(images, size).to(model.device)
            out[start : start + len(images)] = encode(model, pixels).to(torch.float16).cpu().numpy()
        out.flush()

    seen = "_".join(map(str, layers))
    return np.load(build_once(f"features-{split}-{size}-{seen}", build) / "features.npy", mmap_mode="r")
