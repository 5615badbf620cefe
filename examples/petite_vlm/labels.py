"""What each patch of a picture shows, as numbers: the targets of `align`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from .data.canvas import SIZE
from .data.regions import VOCABULARY, Box, Region

INSET = 0.12
"""Share of a box's side that is left out at each edge: things seldom fill their corners."""
POSITIONS: dict[str, tuple[str, ...]] = {"row": ("top", "middle", "bottom"), "column": ("left", "center", "right")}
GROUPS: dict[str, tuple[str, ...]] = {**VOCABULARY, **POSITIONS}  # type: ignore[dict-item]
"""All that is told of a patch: by group, the words among which it is one, or none."""


def patch_targets(regions: Sequence[Region], side: int) -> dict[str, torch.Tensor]:
    """By group, ``[side * side, words + 1]`` float32: the share of each word in each patch, the last is "none".

    A patch is said to show what its centre lies on, and what a point inside it says. Rows of row and column speak of
    thirds of the picture and never say none.
    """
    found = {group: torch.zeros(side * side, len(words) + 1) for group, words in GROUPS.items()}
    for region in regions:
        at = _patches(region.box, side)
        for group, word in region.says.items():
            found[group][at, GROUPS[group].index(word)] = 1.0
    thirds = torch.arange(side) * 3 // side
    found["row"][torch.arange(side * side), thirds.repeat_interleave(side)] = 1.0
    found["column"][torch.arange(side * side), thirds.repeat(side)] = 1.0
    for share in found.values():
        share[:, -1] = (share.sum(1) == 0).float()
        share /= share.sum(1, keepdim=True)
    return found


def _patches(box: Box, side: int) -> torch.Tensor:
    """Numbers of the patches that a box covers, in reading order; at least the one of its middle."""
    patch = SIZE / side
    left, top, right, bottom = box
    across, down = INSET * (right - left), INSET * (bottom - top)
    centres = (torch.arange(side) + 0.5) * patch
    columns = ((centres >= left + across) & (centres <= right - across)).nonzero().flatten()
    rows = ((centres >= top + down) & (centres <= bottom - down)).nonzero().flatten()
    middle = [min(side - 1, max(0, int(edge / patch))) for edge in ((top + bottom) / 2, (left + right) / 2)]
    if not len(rows):
        rows = torch.tensor([middle[0]])
    if not len(columns):
        columns = torch.tensor([middle[1]])
    return (rows[:, None] * side + columns).flatten()


class WordDirections(nn.Module):
    """Scores a vector of the decoder's input space against the embeddings of the words of each group.

    A group's word points from the middle of the group to its own embedding: to look like a word is to lie in its
    direction. A word of several tokens, or with and without a space before it, is the mean of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, embedding: torch.Tensor, sharpness: float = 8.0) -> None:
        """``embedding`` [vocabulary, width] float32; ``sharpness``: the score of a word's own embedding."""
        super().__init__()
        self.sharpness = sharpness
        self.none = nn.ParameterDict({group: nn.Parameter(torch.tensor(sharpness / 2)) for group in GROUPS})
        means = {}
        for group, words in GROUPS.items():
            means[group] = torch.stack([_embedding(tokenizer, embedding, word) for word in words])
        self.register_buffer("middle", torch.cat(list(means.values())).mean(0))
        self.register_buffer("size", (torch.cat(list(means.values())) - self.get_buffer("middle")).norm(dim=1).mean())
        for group, vectors in means.items():
            away = vectors - vectors.mean(0)
            self.register_buffer(f"to_{group}", away / away.pow(2).sum(1, keepdim=True))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """By group, scores ``[..., words + 1]`` of ``x`` ``[..., width]``; the last is that of "none"."""
        away = x - self.get_buffer("middle")
        scores = {}
        for group in GROUPS:
            words = self.sharpness * away @ self.get_buffer(f"to_{group}").T
            scores[group] = torch.cat([words, self.none[group].expand(*words.shape[:-1], 1)], dim=-1)
        return scores

    def length(self, x: torch.Tensor) -> torch.Tensor:
        """How far ``x`` is from the middle of all words, where one word is 1: ``[...]``."""
        return (x - self.get_buffer("middle")).norm(dim=-1) / self.get_buffer("size")


def _embedding(tokenizer: PreTrainedTokenizerFast, embedding: torch.Tensor, word: str) -> torch.Tensor:
    ids = [*tokenizer(word)["input_ids"], *tokenizer(f" {word}")["input_ids"]]
    return embedding[ids].float().mean(0)
