"""Recognises multi-head latent attention: keys and values that are made from latents which all heads share.

The cache of such a layer holds one row of numbers a token for all heads (*latents*) and one rotated key, and every call
makes the keys and values of each head from all of them (DeepSeek-V2, arXiv 2405.04434, section 2.1):

    both = linear(latents, weight).view(batch, keys, heads, nope + value_dim).transpose(1, 2)
    k_nope, value = split(both, [nope, value_dim], -1)
    key = cat([k_nope, rotated.expand(heads)], -1)      # or written side by side into an empty tensor

Matched by what the nodes do, from keys and values backwards; what a model calls them does not matter.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from avl_fx.passes.nodes import (
    arg,
    fake,
    mutated_inputs,
    op,
    same_size,
    shape,
    writes_to,
    written_between,
)
from avl_fx.passes.site import Site

__all__ = [
    "ExpandedKeys",
    "Expansion",
    "expanded_keys",
    "expansion",
    "is_plain",
    "latents_of",
    "reads_latents",
    "unchanged",
]

_LAST = (-1, 3)


@dataclass(frozen=True)
class Expansion:
    """``linear(latents, weight)``, seen as heads of ``width`` each, of which ``first`` to ``last`` are taken."""

    latents: fx.Node
    """``[batch, 1, keys, rank]``"""
    weight: fx.Node
    """``[heads * width, rank]``"""
    heads: int
    width: int
    first: int
    last: int
    product: fx.Node
    """Where the model reads ``latents``."""
    rows: tuple[slice, ...] | None
    """``[:, :, first:last]`` that it takes of the keys in the end; ``None``: all."""


@dataclass(frozen=True)
class ExpandedKeys:
    """Keys of which one part is an expansion and the other is shared by all heads."""

    nope: Expansion
    rotated: fx.Node
    """``[batch, 1, keys, rope_dim]``"""
    rotated_first: bool
    """Which of the two stands first in a key."""
    since: fx.Node
    """Where the model reads ``rotated``."""
    rows: tuple[slice, ...] | None
    """As `Expansion.rows`, of both parts."""


def latents_of(site: Site) -> tuple[fx.Node, fx.Node] | None:
    """Latents and rotated keys that the canonical node of ``site`` attends to, as one cache layer stores them.

    Either it reads them as they are (`absorb_latents`), or keys and values that were made from them.
    """
    node = site.node
    if not site.latent or node is None or node.target is not torch.ops.avl.attention.default:
        return None
    key, value = node.args[1:3]
    if reads_latents(site):
        return _side_by_side(key)
    keys, values = expanded_keys(key), expansion(value)
    if keys is None or values is None or keys.nope.latents is not values.latents:
        return None
    # Positions of keys are those of the cache, from its first row on.
    if any(rows is not None and rows[2].start not in (None, 0) for rows in (keys.rows, values.rows)):
        return None
    return keys.nope.latents, keys.rotated


def reads_latents(site: Site) -> bool:
    """Whether its canonical node reads them as they are: side by side they are its keys, by themselves its values."""
    node = site.node
    if not site.latent or node is None or node.target is not torch.ops.avl.attention.default:
        return False
    parts = _side_by_side(node.args[1])
    return parts is not None and parts[0] is node.args[2]


def expansion(node: Any) -> Expansion | None:
    """``node`` ``[batch, heads, keys, dim]`` as the heads of one projection, or a part of each."""
    node, rows = _rows_taken(node)
    taken = _part(node)
    if taken is None:
        return None
    whole, first, last = taken
    if op(whole) != "transpose" or {d % 4 for d in whole.args[1:3] if isinstance(d, int)} != {1, 2}:
        return None
    by_head = whole.args[0]
    if op(by_head) not in ("view", "reshape", "unflatten"):
        return None
    product: Any = by_head.args[0]  # type: ignore[union-attr]
    if op(product) != "linear" or arg(product, 2, "bias") is not None:
        return None
    latents, weight = arg(product, 0, "input"), arg(product, 1, "weight")
    sizes, given, outer = shape(whole) or (), shape(latents) or (), shape(weight) or ()
    if len(sizes) != 4 or len(given) != 4 or given[1] != 1 or len(outer) != 2:
        return None
    _, heads, keys, width = sizes
    if not isinstance(heads, int) or not isinstance(width, int) or heads * width != outer[0]:
        return None
    # The view splits the last dimension alone: everything before it is as it was.
    if not (same_size(given[0], sizes[0]) and same_size(given[2], keys)):
        return None
    return Expansion(latents, weight, heads, width, first, last, product, rows)


def expanded_keys(node: Any) -> ExpandedKeys | None:
    """``node`` ``[batch, heads, keys, head_dim]`` as an expansion beside what is shared by all heads."""
    node, rows = _rows_taken(node)
    parts = _side_by_side(node) or _written_side_by_side(node)
    if parts is None:
        return None
    for index, part in enumerate(parts):
        nope, other = expansion(part), parts[1 - index]
        rotated = _shared_by_heads(other) if nope is not None else None
        if nope is not None and nope.rows is None and rotated is not None:
            since = next((user for user in other.users if mutated_inputs(user)), other)
            return ExpandedKeys(nope, rotated, index == 1, since, rows)
    return None


def _rows_taken(node: Any) -> tuple[Any, tuple[slice, ...] | None]:
    """``x`` and the index, of ``x[:, :, first:last]``; any other node and ``None``."""
    index = node.args[1] if op(node) == "getitem" else None
    if not isinstance(index, tuple) or len(index) not in (3, 4) or len(shape(node.args[0]) or ()) != 4:
        return node, None
    if not isinstance(index[2], slice) or index[2].step not in (None, 1):
        return node, None
    if any(part != slice(None) for i, part in enumerate(index) if i != 2):
        return node, None
    return node.args[0], index


def _part(node: Any) -> tuple[fx.Node, int, int] | None:
    """The tensor that ``node`` is a slice of in the last dimension, with where it starts and ends there."""
    sizes = shape(node)
    if not isinstance(node, fx.Node) or sizes is None or len(sizes) != 4:
        return None
    if op(node) == "getitem" and op(node.args[0]) in ("split", "split_with_sizes"):
        split, index = node.args[0], node.args[1]
        parts = arg(split, 1, "split_size_or_sections", arg(split, 1, "split_size"))  # type: ignore[arg-type]
        dim = arg(split, 2, "dim", 0)  # type: ignore[arg-type]
        if dim not in _LAST or not isinstance(index, int) or not isinstance(parts, list | tuple | int):
            return None
        whole: Any = split.args[0]  # type: ignore[union-attr]
        width = (shape(whole) or (None,))[-1]
        if isinstance(parts, int):
            parts = [parts] * (width // parts) if isinstance(width, int) else []
        if not all(isinstance(size, int) for size in parts) or sum(parts) != width:
            return None
        first = sum(parts[:index])
        return whole, first, first + parts[index]
    if op(node) == "getitem" and isinstance(source := node.args[0], fx.Node):
        width = (shape(source) or (None,))[-1]
        bounds = _last_slice(node.args[1], len(shape(source) or ()), width)
        return None if bounds is None else (source, *bounds)
    return (node, 0, sizes[3]) if isinstance(sizes[3], int) else None


def _last_slice(index: Any, rank: int, width: Any) -> tuple[int, int] | None:
    """Of ``x[..., first:last]``: both bounds; ``None`` for any other index."""
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(width, int) or not parts or not isinstance(parts[-1], slice):
        return None
    if not (parts[0] is Ellipsis and len(parts) == 2) and len(parts) != rank:
        return None
    if any(part is not Ellipsis and part != slice(None) for part in parts[:-1]):
        return None
    bounds = parts[-1].start, parts[-1].stop, parts[-1].step
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    first, last, step = parts[-1].indices(width)
    return (first, last) if step == 1 and first < last else None


def _side_by_side(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of ``cat([a, b], -1)``."""
    if op(node) != "cat" or arg(node, 1, "dim", 0) not in _LAST or len(shape(node) or ()) != 4:
        return None
    parts = arg(node, 0, "tensors")
    if not isinstance(parts, list | tuple) or len(parts) != 2 or not all(isinstance(p, fx.Node) for p in parts):
        return None
    return parts[0], parts[1]


def _written_side_by_side(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """Two tensors that were copied into an empty one, next to each other in its last dimension."""
    if op(node) not in ("new_empty", "empty", "empty_like", "new_zeros", "zeros"):
        return None
    writes = writes_to(node)
    width = (shape(node) or (None,))[-1]
    found: list[tuple[int, int, fx.Node]] = []
    for write in writes:
        if op(write) == "copy_":
            target, source = write.args[0], arg(write, 1, "src", arg(write, 1, "other"))
            index = target.args[1] if op(target) == "getitem" and target.args[0] is node else None  # type: ignore[union-attr]
        elif op(write) == "setitem":
            target, index, source = write.args
            index = index if target is node else None
        else:
            return None
        bounds = _last_slice(index, 4, width)
        if bounds is None or not isinstance(source, fx.Node) or fake(source).dtype != fake(node).dtype:
            return None
        found.append((*bounds, source))
    found.sort(key=operator.itemgetter(0))
    if len(found) != 2 or (found[0][0], found[0][1], found[1][1]) != (0, found[1][0], width):
        return None
    # A copy may repeat what it is given; only heads are looked at later.
    outer, inner = shape(node) or (), [shape(source) or () for _, _, source in found]
    if any(len(sizes) != 4 or not all(same_size(sizes[d], outer[d]) for d in (0, 2)) for sizes in inner):
        return None
    return found[0][2], found[1][2]


def _shared_by_heads(node: fx.Node) -> fx.Node | None:
    """``x`` ``[batch, 1, keys, dim]``, of which ``node`` is ``x.expand(-1, heads, -1, -1)`` or ``x`` itself."""
    source = node.args[0] if op(node) in ("expand", "broadcast_to") else node
    old, new = shape(source) or (), shape(node) or ()
    if not isinstance(source, fx.Node) or len(old) != 4 or len(new) != 4 or old[1] != 1:
        return None
    return source if all(same_size(old[d], new[d]) for d in (0, 2, 3)) else None


def unchanged(tensors: Sequence[tuple[fx.Node, fx.Node]], node: fx.Node) -> bool:
    """Whether nothing writes to any of the tensors between where it was read and ``node``."""
    return not any(written_between(tensor, since, node) for tensor, since in tensors)


def is_plain(weight: fx.Node) -> bool:
    """Whether ``weight`` is an ordinary tensor: no subclass, such as a quantised one, with a product of its own."""
    return not hasattr(fake(weight), "__tensor_flatten__")
