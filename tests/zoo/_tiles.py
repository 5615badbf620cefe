"""What the models with any-resolution tiles share: 5-D pixels, padded to the most tiles, and image sizes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.zoo._base import IMAGE, dtype_of, pixels, prompt

SIDE, PATCH = 12, 6


def inputs(
    model: torch.nn.Module,
    images: Mapping[str, tuple[tuple[int, int], int, int]],
    batch: int,
    seed: int,
    first: int,
) -> dict[str, Tensor]:
    """A prompt whose images "A" and "B" are given as (height and width, tiles with the base tile, tokens)."""

    def image(name: str, generator: torch.Generator) -> tuple[list[int], tuple[Tensor, tuple[int, int]]]:
        size, tiles, tokens = images[name]
        return [IMAGE] * tokens, (pixels(generator, tiles, 3, SIDE, SIDE), size)

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        tiles, sizes = zip(*made.flat_images, strict=True)
        padded = torch.nn.utils.rnn.pad_sequence(list(tiles), batch_first=True)
        out |= {"pixel_values": padded.to(dtype_of(model)), "image_sizes": torch.tensor(sizes)}
    return out
