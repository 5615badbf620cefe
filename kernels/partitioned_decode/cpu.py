"""CPU implementation of `avl::partitioned_decode`: the C++ kernel, or ATen where it cannot be built."""

from torch import Tensor

from avl_fx.kernels.partitioned_decode.aten import partitioned_decode_aten
from avl_fx.kernels.partitioned_decode.native import partitioned_decode_native


def partitioned_decode_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`avl::partitioned_decode` on CPU; see the schema for shapes."""
    arguments = query, key, value, new_key, new_value, mask, segments, weigh, scale
    done = partitioned_decode_native(*arguments)
    return partitioned_decode_aten(*arguments) if done is None else done
