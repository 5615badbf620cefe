"""`avl::anchor_decode`: `avl::partitioned_decode` that hands its logits on, for the lazy layers behind it."""

import torch
from torch import Tensor

from avl_fx.kernels.dispatch import implementation, keep_in_python
from avl_fx.kernels.partitioned_decode.schema import check, decode_error

__all__ = ["anchor_decode"]

NAME = "avl::anchor_decode"


def anchor_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one query per batch row, and its logits, which lazy layers inherit (arXiv 2602.01901).

    Args:
        query, key, value, new_key, new_value, mask, segments, weigh, scale: as in `avl::partitioned_decode`.

    Returns:
        Output and weights as of `avl::partitioned_decode`, and the logits, float32 ``[batch, heads, K']``: query.key
        times ``scale`` plus the mask, -inf for keys that are not read or that the mask hides.

    Raises:
        ValueError, NotImplementedError: as `avl::partitioned_decode`.
    """
    from avl_fx.kernels.inherited_decode import ANCHOR_IMPLEMENTATIONS

    check(query, key, value, new_key, new_value, segments, weigh)
    return implementation("anchor_decode", ANCHOR_IMPLEMENTATIONS, query.device)(
        query, key, value, new_key, new_value, mask, segments, weigh, scale
    )


torch.library.define(
    NAME,
    torch.library.infer_schema(anchor_decode, mutates_args=()),
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
torch.library.impl(NAME, "CompositeExplicitAutograd")(anchor_decode)


@torch.library.register_fake(NAME)
def _(query, key, value, new_key, new_value, mask, segments, weigh, scale):
    batch, kv_heads, keys, _ = key.shape
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    seen = keys if new_key is None else keys + 1
    weights = query.new_empty((batch, kv_heads, 0 if weigh is None else seen), dtype=torch.float32)
    return out, weights, query.new_empty((batch, query.shape[1], seen), dtype=torch.float32)


keep_in_python(NAME, anchor_decode, decode_error)
