"""CPU implementations: the C++ kernel of `avl::partitioned_decode`, or ATen where it cannot be built."""

import torch
from torch import Tensor

from avl_fx.kernels.inherited_decode.aten import anchor_decode_aten, inherited_decode_aten
from avl_fx.kernels.partitioned_decode.capacity import check_spare_row
from avl_fx.kernels.partitioned_decode.native import partitioned_decode_native, run


def anchor_decode_cpu(
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
    """`avl::anchor_decode` on CPU; see the schema for shapes."""
    arguments = query, key, value, new_key, new_value, mask, segments, weigh, scale
    seen = key.shape[2] + (new_key is not None)
    kept = torch.full((query.shape[0], query.shape[1], seen), -torch.inf, dtype=torch.float32, device="cpu")
    done = partitioned_decode_native(*arguments, kept=kept)
    return anchor_decode_aten(*arguments) if done is None else (*done, kept)


def inherited_decode_cpu(
    logits: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    inherited: Tensor | None,
    scale: float,
    anchor_key: Tensor | None = None,
) -> Tensor:
    """`avl::inherited_decode` on CPU; see the schema for shapes."""
    if new_value is not None:
        check_spare_row(value)
    if key is not None and new_key is not None:
        check_spare_row(key)
    done = run(
        *(query, key, value, new_key, new_value, mask, segments, None, scale),
        heads=(query if query is not None else logits).shape[1],  # type: ignore[union-attr]
        dtype=value.dtype,
        logits=None if logits is None else logits.contiguous(),
        inherited=inherited,
        anchor_key=anchor_key,
    )
    if done is not None:
        return done[0]
    return inherited_decode_aten(
        logits, query, key, value, new_key, new_value, mask, segments, inherited, scale, anchor_key
    )
