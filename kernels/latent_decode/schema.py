"""`avl::latent_decode`: `avl::partitioned_decode` for a cache of latents that all heads share.

A layer of multi-head latent attention stores one row of latents and one rotated key a token (DeepSeek-V2, arXiv
2405.04434, section 2.1). Once the query went through the key's half of the projection (`avl_fx.passes.absorb_latents`),
a key is both side by side and a value is the latents, so that nothing has to be expanded, or put together, to be read.
"""

import torch
from torch import Tensor

from avl_fx.kernels.dispatch import implementation, keep_in_python
from avl_fx.kernels.partitioned_decode.capacity import check_spare_row
from avl_fx.kernels.partitioned_decode.schema import check_reading, check_rows

__all__ = ["latent_decode"]

NAME = "avl::latent_decode"


def latent_decode(
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
    """Attention of one query per batch row over ranges of latents; rows outside of them are not read.

    Args:
        query: ``[batch, heads, 1, rank + rope_dim]``; float32, bfloat16 or float16 (the reference also takes float64).
        latents: ``[batch, 1, keys, rank]``: values, and the first part of keys. Any strides with a contiguous last
            dimension.
        rotated: ``[batch, 1, keys, rope_dim]``: the second part of keys, strided in any way as well.
        new_latents: ``[batch, 1, 1, rank]`` or ``None``: the row of this step's token, stored behind the last one as
            `avl::partitioned_decode` does: K' = ``keys + 1``. Without it K' = ``keys``.
        new_rotated: ``[batch, 1, 1, rope_dim]``; given exactly when ``new_latents`` is.
        mask, segments, weigh, scale: as in `avl::partitioned_decode`.

    Returns:
        Two tensors. Weighted latents, ``[batch, heads, 1, rank]`` in the query's dtype: zeros for a row that sees no
        key. The weights, float32 ``[batch, 1, K']``: softmax probabilities averaged over all heads; as in
        `avl::partitioned_decode` where they are not asked for.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a new row without room behind the last one.
        NotImplementedError: a device without an implementation.

    What is said of NaN and of the row that is stored at `avl::partitioned_decode` holds here.
    """
    from avl_fx.kernels.latent_decode import IMPLEMENTATIONS

    check(query, latents, rotated, new_latents, new_rotated, segments, weigh)
    return implementation("latent_decode", IMPLEMENTATIONS, query.device)(
        query, latents, rotated, new_latents, new_rotated, mask, segments, weigh, scale
    )


torch.library.define(
    NAME,
    torch.library.infer_schema(latent_decode, mutates_args=()),
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
torch.library.impl(NAME, "CompositeExplicitAutograd")(latent_decode)


@torch.library.register_fake(NAME)
def _(query, latents, rotated, new_latents, new_rotated, mask, segments, weigh, scale):
    batch, shared, keys, rank = latents.shape
    seen = keys if new_latents is None else keys + 1
    weights = query.new_empty((batch, shared, 0 if weigh is None else seen), dtype=torch.float32)
    return query.new_empty((*query.shape[:-1], rank)), weights


def check(
    query: Tensor,
    latents: Tensor,
    rotated: Tensor,
    new_latents: Tensor | None,
    new_rotated: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
) -> None:
    """Raise what `latent_decode` says of these arguments."""
    batch, _, queries, dim = query.shape
    if queries != 1:
        raise ValueError(f"query: {queries} rows instead of one. Fix: use avl::attention for more than one query.")
    if latents.shape[:2] != (batch, 1) or rotated.shape[:3] != latents.shape[:3]:
        raise ValueError(f"latents, rotated: {tuple(latents.shape)} and {tuple(rotated.shape)} do not fit together.")
    if dim != latents.shape[3] + rotated.shape[3]:
        raise ValueError(f"query: {dim} elements instead of {latents.shape[3]} + {rotated.shape[3]}.")
    if latents.dtype != query.dtype or rotated.dtype != query.dtype:
        raise ValueError(f"latents, rotated: {latents.dtype} and {rotated.dtype} beside a query of {query.dtype}.")
    if (new_latents is None) != (new_rotated is None):
        raise ValueError("new_latents, new_rotated: only one of them is given. Fix: give both or neither.")
    check_rows("latents", latents, new_latents)
    check_rows("rotated", rotated, new_rotated)
    check_reading(query, segments, weigh, latents=latents, rotated=rotated)


def _error(query, latents, rotated, new_latents, new_rotated, mask, segments, weigh, scale) -> str:
    """What `latent_decode` would raise, in words; empty: nothing."""
    try:
        check(query, latents, rotated, new_latents, new_rotated, segments, weigh)
        if new_latents is not None:
            check_spare_row(latents)
            check_spare_row(rotated)
        if mask is not None:
            mask.expand(*query.shape[:2], 1, latents.shape[2] + (new_latents is not None))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


keep_in_python(NAME, latent_decode, _error)
