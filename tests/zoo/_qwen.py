"""What the Qwen-VL models share: packed patches of images of any size, their grids, and modality ids."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION_END, VISION_START, dtype_of, pixels, prompt

PATCH, MERGE, TEMPORAL = 4, 2, 2
GRIDS = {"A": (1, 4, 6), "B": (1, 8, 8)}  # patches: time, height, width; 6 and 16 tokens

TEXT = {**DECODER, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
TOWER = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": TEMPORAL,
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}


def merged(t: int, h: int, w: int) -> int:
    """How many tokens a grid of patches becomes."""
    return t * h * w // MERGE**2


def inputs(
    model: torch.nn.Module,
    batch: int = 1,
    seed: int = 0,
    first: int = 0,
    *,
    tokens_of: Callable[[int, int, int], int] = merged,
    frames: int = TEMPORAL,
) -> dict[str, Tensor]:
    """A prompt whose patches are of ``frames`` (1: images have no time), and a grid of them ``tokens_of`` tokens."""

    def image(size: str, generator: torch.Generator) -> tuple[list[int], tuple[Tensor, tuple[int, int, int]]]:
        t, h, w = GRIDS[size]
        tokens = [VISION_START, *[IMAGE] * tokens_of(t, h, w), VISION_END]
        patches = pixels(generator, t * h * w, 3 * TEMPORAL * PATCH**2)
        return tokens, (patches[:, : 3 * frames * PATCH**2], GRIDS[size])

    made = prompt(image, batch, seed, first)
    out = {
        "input_ids": made.input_ids,
        "attention_mask": made.attention_mask,
        "mm_token_type_ids": (made.input_ids == IMAGE).int(),
    }
    if made.flat_images:
        patches, grids = zip(*made.flat_images, strict=True)
        out |= {"pixel_values": torch.cat(patches).to(dtype_of(model)), "image_grid_thw": torch.tensor(grids)}
    return out
