"""CPU implementation of `avl::latent_decode`: the C++ kernel of `avl::partitioned_decode`, or ATen."""

from torch import Tensor

from avl_fx.kernels.latent_decode.aten import latent_decode_aten
from avl_fx.kernels.partitioned_decode.capacity import check_spare_row
from avl_fx.kernels.partitioned_decode.native import run


def latent_decode_cpu(
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
    """`avl::latent_decode` on CPU; see the schema for shapes."""
    if new_latents is not None:
        check_spare_row(latents)
        check_spare_row(rotated)
    done = run(
        *(query, latents, latents, None, new_latents, mask, segments, weigh, scale),
        heads=query.shape[1],
        dtype=query.dtype,
        rotated=rotated,
        new_rotated=new_rotated,
    )
    if done is not None:
        return done
    return latent_decode_aten(query, latents, rotated, new_latents, new_rotated, mask, segments, weigh, scale)
