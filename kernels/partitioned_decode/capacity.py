"""The row behind the last row of a cache view: where a decode step stores its token's key and value."""

from torch import Tensor

__all__ = ["check_spare_row", "has_spare_row", "with_spare_row"]


def has_spare_row(view: Tensor) -> bool:
    """Whether ``view`` ``[batch, kv_heads, keys, dim]`` could have one row more, in the same memory.

    Not so where the buffer ends before that row, or where other rows of the view lie.
    """
    batch, kv_heads, keys, dim = view.shape
    extent = 1
    # Without overlap, every dimension steps over all that the dimensions of smaller steps span.
    for stride, size in sorted(zip(view.stride(), (batch, kv_heads, keys + 1, dim), strict=True)):
        if size > 1 and stride < extent:
            return False
        extent += (size - 1) * stride
    return (view.storage_offset() + extent) * view.element_size() <= view.untyped_storage().nbytes()


def check_spare_row(view: Tensor) -> None:
    """Raise unless `has_spare_row`.

    Raises:
        ValueError: there is no such row.
    """
    if not has_spare_row(view):
        keys = view.shape[2]
        raise ValueError(
            f"key, value: no spare row behind the {keys} rows of a view of shape {tuple(view.shape)} and strides "
            f"{view.stride()}. Fix: pass a view of a buffer with capacity for at least {keys + 1} rows."
        )


def with_spare_row(view: Tensor) -> Tensor:
    """``view`` (``[batch, kv_heads, keys, dim]``, last dimension contiguous) with one more row, in the same memory.

    Raises:
        ValueError: there is no such row.
    """
    check_spare_row(view)
    batch, kv_heads, keys, dim = view.shape
    # `.data`: storing there is no write to what other views show, and does not count as one.
    return view.data.as_strided((batch, kv_heads, keys + 1, dim), view.stride(), view.storage_offset())
