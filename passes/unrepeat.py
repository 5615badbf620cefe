"""Looks through `repeat_kv`: from keys repeated for every query head back to the keys the cache holds."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from avl_fx.passes.nodes import arg, op, shape
from avl_fx.passes.rewrite import insert_call

__all__ = ["is_repeated", "unrepeat"]


def is_repeated(node: fx.Node) -> bool:
    """Whether ``node`` is keys or values repeated for every query head."""
    return _expanded_source(node) is not None or _interleaved_source(node) is not None


def unrepeat(node: fx.Node, before: fx.Node) -> fx.Node:
    """The un-repeated source of ``node`` (``[batch, heads, keys, dim]``), or ``node`` itself.

    Sees through slices of the keys taken *after* repeating, which are inserted again before ``before`` on the
    un-repeated tensor, and through copies that change no element.
    """
    if op(node) == "getitem" and isinstance(node.args[0], fx.Node):
        index = node.args[1]
        if isinstance(index, tuple) and len(index) in (3, 4) and index[:2] == (slice(None), slice(None)):
            source = unrepeat(node.args[0], before)
            if source is not node.args[0] and all(isinstance(i, slice) for i in index):
                return insert_call(before, operator.getitem, source, index)
        return node
    if op(node) == "contiguous" and isinstance(node.args[0], fx.Node):
        source = unrepeat(node.args[0], before)
        return node if source is node.args[0] else source
    return _expanded_source(node) or _interleaved_source(node) or node


def _expanded_source(node: fx.Node) -> fx.Node | None:
    """``reshape(expand(x[:, :, None]), ...)`` and its spellings (view, flatten, unsqueeze)."""
    if op(node) not in ("reshape", "view", "flatten", "contiguous"):
        return None
    expanded = node.args[0]
    if op(expanded) == "contiguous":
        expanded = expanded.args[0]  # type: ignore[union-attr]
    if op(expanded) not in ("expand", "repeat"):
        return None
    grouped = expanded.args[0]  # type: ignore[union-attr]
    if not isinstance(grouped, fx.Node):
        return None
    source = _ungrouped(grouped)
    if source is None:
        return None
    src, exp, out = shape(source) or (), shape(expanded) or (), shape(node) or ()
    if (len(src), len(exp), len(out)) != (4, 5, 4):
        return None
    # [b, kv, keys, dim] -> [b, kv, groups, keys, dim] -> [b, kv * groups, keys, dim]: the new dimension stands after
    # the heads, everything else is untouched.
    same = all(str(a) == str(b) for a, b in ((src[0], exp[0]), (src[1], exp[1]), (src[2], exp[3]), (src[3], exp[4])))
    merged = (
        isinstance(out[1], int)
        and isinstance(src[1], int)
        and isinstance(exp[2], int)
        and out[1] == src[1] * exp[2]
        and str(out[0]) == str(src[0])
        and str(out[2]) == str(src[2])
        and str(out[3]) == str(src[3])
    )
    return source if same and merged else None


def _ungrouped(node: fx.Node) -> fx.Node | None:
    """The input of ``x[:, :, None]`` or ``x.unsqueeze(2)``."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if op(node) == "unsqueeze":
        dim = arg(node, 1, "dim")
        rank = len(shape(source) or ())
        return source if isinstance(dim, int) and dim % (rank + 1) == 2 else None
    if op(node) == "getitem":
        index = node.args[1]
        whole: Any = slice(None)
        if isinstance(index, tuple) and index[:3] == (whole, whole, None) and all(i == whole for i in index[3:]):
            return source
    return None


def _interleaved_source(node: fx.Node) -> fx.Node | None:
    """``repeat_interleave(x, groups, dim=1)``."""
    if op(node) != "repeat_interleave":
        return None
    source, repeats, dim = arg(node, 0, "input"), arg(node, 1, "repeats"), arg(node, 2, "dim")
    rank = len(shape(source) or ())
    if isinstance(repeats, int) and isinstance(dim, int) and rank == 4 and dim % rank == 1:
        return source
    return None
