"""The row behind the last row of a cache view: where a decode step stores its token's key and value."""

from torch import Tensor

__all__ = ["with_spare_row"]


def with_spare_row(view: Tensor) -> Tensor:
    """``view`` (``[batch, kv_heads, keys, dim]``, last dimension contiguous) with one more row, in the same memory.

    Raises:
        ValueError: the buffer ends before that row, or other rows of the view lie there.
    """
    batch, kv_heads, keys, dim = view.shape
    shape, strides, offset = (batch, kv_heads, keys + 1, dim), view.stride(), view.storage_offset()
    extent = 1
    # Without overlap, every dimension steps over all that the dimensions of smaller steps span.
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride < extent:
            break
        extent += (size - 1) * stride
    else:
        if (offset + extent) * view.element_size() <= view.untyped_storage().nbytes():
            # `.data`: storing there is no write to what other views show, and does not count as one.
            return view.data.as_strided(shape, strides, offset)
    raise ValueError(
        f"key, value: no spare row behind the {keys} rows of a view of shape {tuple(view.shape)} and strides "
        f"{strides}. Fix: pass a view of a buffer with capacity for at least {keys + 1} rows."
    )
