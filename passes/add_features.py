"""Features that a model adds at visual positions are added everywhere: zeros where there are none.

Some models let features of earlier vision layers enter the decoder layer by layer (deepstack). They write

    h = h.clone(); h[mask] = h[mask] + features              # Qwen3-VL
    h = h.masked_scatter(mask, h[mask] + features)           # Granite 4 Vision

where what a token gets depends on how many visual ones stand before it. ``h + scattered``, with the features among the
positions first, is the same to the bit, and what happens to one token depends on nothing but that token and its row of
``scattered``: a prompt can drop tokens in front of it (`filter_prompt`). Nothing else needs that, so every other graph
keeps what its model wrote.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import (
    aliases,
    arg,
    fake,
    mutated_inputs,
    op,
    same_size,
    shape,
    writes_to,
    written_between,
)
from avl_fx.passes.rewrite import insert_call
from avl_fx.passes.site import PassResult

__all__ = ["add_features"]


_SIZES = frozenset({"size", "sym_size"})


class _Addition(NamedTuple):
    hidden: fx.Node
    """``[batch, tokens, hidden]``, to which features are added."""
    mask: fx.Node
    """bool ``[batch, tokens]``"""
    features: fx.Node
    """``[visual tokens, hidden]``, row after row of the batch."""
    rows: fx.Node
    """``hidden[mask]``, whose size Dynamo compares with that of the features."""
    result: fx.Node
    """What is read afterwards: a tensor of its own."""
    replaced: tuple[fx.Node, ...]
    """What goes, users first."""


def add_features(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Rewrite features that are added under a mask of positions, in a prompt that ``ctx.plan`` filters."""
    result = PassResult("add_features")
    if not ctx.plan.filters_prompts or ctx.partition is None or ctx.partition.decode or ctx.compact is None:
        return result
    dropped = []
    for node in list(gm.graph.nodes):
        found = _written(node) or _scattered(node)
        if found is None:
            continue
        stream, rows = fake(found.hidden), found.rows
        batch, tokens = (insert_call(rows, "size", found.mask, dim) for dim in (0, 1))
        like = {"dtype": stream.dtype, "device": stream.device}
        zeros = insert_call(rows, "new_zeros", found.mask, (batch, tokens, stream.shape[2]), **like)
        everywhere = insert_call(node, torch.index_put, zeros, (found.mask,), found.features)
        total = insert_call(node, torch.add, found.hidden, everywhere)
        for user in list(found.result.users):
            if user not in found.replaced:
                user.replace_input_with(found.result, total)
        rows.args = (zeros, rows.args[1])
        for old in found.replaced:
            if mutated_inputs(old):
                dropped.append(old.name)
            if not old.users:
                gm.graph.erase_node(old)
        result.count += 1
    result.dropped_mutations = (*result.dropped_mutations, *dropped)
    return result


def _written(node: fx.Node) -> _Addition | None:
    """``node`` as the assignment of ``h = h.clone(); h[mask] = h[mask] + features``."""
    if op(node) != "setitem":
        return None
    own, index, total = node.args
    mask = _row_mask(index)
    if op(own) != "clone" or mask is None or writes_to(own) != [node]:  # type: ignore[arg-type]
        return None
    found = _sum(total, own, mask, node)
    if found is None:
        return None
    rows, features = found
    # Whoever reads the copy before features are in it would read another tensor afterwards.
    same = {alias for alias in aliases(own) if alias not in (rows, node)}  # type: ignore[arg-type]
    if any(user < node and user is not rows for alias in same for user in alias.users):
        return None
    hidden = own.args[0]  # type: ignore[union-attr]
    if not isinstance(hidden, fx.Node) or written_between(hidden, own, node):  # type: ignore[arg-type]
        return None
    return _Addition(hidden, mask, features, rows, own, (node, total, rows, own))  # type: ignore[arg-type]


def _scattered(node: fx.Node) -> _Addition | None:
    """``node`` as ``h.masked_scatter(mask, h[mask] + features)``."""
    if op(node) != "masked_scatter":
        return None
    hidden, wide, flat = arg(node, 0, "input"), arg(node, 1, "mask"), arg(node, 2, "source")
    flattened: tuple[fx.Node, ...] = ()
    if op(flat) in ("view", "reshape", "flatten") and set(flat.users) == {node}:
        flattened, flat = (flat,), flat.args[0]
    rows = next((n for n in getattr(flat, "all_input_nodes", ()) if op(n) == "getitem" and n.args[0] is hidden), None)
    mask = None if rows is None else _row_mask(rows.args[1])
    if mask is None or not isinstance(hidden, fx.Node) or not _is_wide(wide, mask):
        return None
    found = _sum(flat, hidden, mask, flattened[0] if flattened else node)
    if found is None or written_between(hidden, found[0], node) or written_between(wide, found[0], node):
        return None
    return _Addition(hidden, mask, found[1], found[0], node, (node, *flattened, flat, found[0]))


def _sum(total: Any, hidden: Any, mask: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``hidden[mask]`` and the features, where ``total`` is their sum, which ``reader`` alone reads."""
    if op(total) != "add" or set(total.users) != {reader} or len(total.args) != 2 or total.kwargs:
        return None
    for rows, features in (total.args, total.args[::-1]):
        if op(rows) != "getitem" or rows.args[0] is not hidden or _row_mask(rows.args[1]) is not mask:
            continue
        values = fake(hidden), fake(features), fake(mask)
        read = {user for user in rows.users if op(user) not in _SIZES}
        if read != {total} or not all(isinstance(value, Tensor) for value in values):
            return None
        stream, added, flags = values
        fits = stream.dim() == 3 and added.dim() == 2 and flags.dim() == 2 and flags.dtype == torch.bool
        fits = fits and (added.dtype, added.device) == (stream.dtype, stream.device)
        if not fits or not all(map(same_size, (*flags.shape, added.shape[1]), stream.shape)):
            return None
        if written_between(mask, rows, reader) or written_between(features, total, reader):
            return None
        return rows, features
    return None


def _row_mask(index: Any) -> fx.Node | None:
    """The mask of rows in ``h[mask]``, ``h[mask, :]`` or ``h[mask, ...]``."""
    first, *rest = index if isinstance(index, tuple | list) else (index,)
    whole = len(rest) == 0 or (len(rest) == 1 and rest[0] in (slice(None), Ellipsis))
    return first if whole and isinstance(first, fx.Node) else None


def _is_wide(wide: Any, mask: fx.Node) -> bool:
    """Whether ``mask`` is ``wide`` without a last dimension of one, which stands for all of the hidden size."""
    sizes = shape(wide)
    if sizes is None or len(sizes) != 3 or sizes[2] != 1 or fake(wide).dtype != torch.bool:
        return False
    if op(mask) == "squeeze" and mask.args[0] is wide:
        return arg(mask, 1, "dim") in (-1, 2)
    return op(wide) == "unsqueeze" and wide.args[0] is mask and arg(wide, 1, "dim") in (-1, 2)
