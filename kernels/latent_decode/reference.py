"""The obvious implementation: latents and rotated keys side by side are keys, latents alone are values."""

import torch
from torch import Tensor

from avl_fx.kernels.partitioned_decode.capacity import with_spare_row
from avl_fx.kernels.partitioned_decode.reference import partitioned_decode_reference


def latent_decode_reference(
    query: Tensor,
    latents: Tensor,
    rotated: Tensor,
    new_latents: Tensor | None,
    new_rotated: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Reference of `avl::latent_decode`; see the schema for shapes."""
    if new_latents is not None and new_rotated is not None:
        latents, rotated = with_spare_row(latents), with_spare_row(rotated)
        latents[:, :, -1:] = new_latents
        rotated[:, :, -1:] = new_rotated
    key = torch.cat([latents, rotated], 3)
    return partitioned_decode_reference(query, key, latents, None, None, mask, segments, weigh, scale)
