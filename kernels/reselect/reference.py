"""Core among secondary by sorting: what the kernels are held against, and what serves where there is none."""

import torch
from torch import Tensor


def reselect_reference(
    scores: Tensor, slots: Tensor, tokens: Tensor, core: Tensor, secondary: Tensor, width: int, most: int
) -> tuple[Tensor, Tensor]:
    """Reference of `avl_fx.kernels.reselect.reselect`; see there for shapes."""
    lying = tokens[..., :width]
    places = slots[:, None, :width].expand_as(lying)
    index, kept = torch.arange(width, device=slots.device), core[:, None, None]
    scores = scores.gather(-1, places.clamp(min=0)).masked_fill(index >= secondary[:, None, None], -torch.inf)
    # Equal scores go to the earlier token.
    by_token = lying.argsort(-1)
    best = by_token.gather(-1, scores.gather(-1, by_token).argsort(dim=-1, descending=True, stable=True))
    wanted = torch.empty_like(best).scatter_(-1, best, index.expand_as(best)) < kept
    inside = index < kept
    leaving, entering = _first(inside & ~wanted, most), _first(wanted & ~inside, most)
    here, there = torch.cat([leaving, entering], -1), torch.cat([entering, leaving], -1)
    unused = here < 0
    here, there = here.clamp(min=0), there.clamp(min=0)
    target = places.gather(-1, here).masked_fill(unused, -1)
    source = places.gather(-1, there).masked_fill(unused, 0)
    # Rows with fewer moves than others write into a column of their own, which is thrown away.
    padded = torch.cat([lying, lying[..., :1]], -1)
    padded.scatter_(-1, here.masked_fill(unused, width), lying.gather(-1, there))
    lying.copy_(padded[..., :width])
    return source, target


def _first(flags: Tensor, most: int) -> Tensor:
    """Where the ``flags`` bool ``[..., width]`` are set, in order; int64 ``[..., most]``, ``-1`` behind the last."""
    index = torch.arange(flags.shape[-1], device=flags.device).expand_as(flags)
    found = index.new_full((*flags.shape[:-1], most + 1), -1)
    found.scatter_(-1, torch.where(flags, flags.cumsum(-1) - 1, most), index)
    return found[..., :most]
