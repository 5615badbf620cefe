"""Visual positions inside a graph, for stages that treat them apart.

A graph that splices image features in shows which of its positions are visual (`locate_modalities`). Where it does not,
or an earlier graph may have spliced in others (images first, then videos), the runtime tells: an input names them as
ranges. Another input names the visual keys that were in the cache before.
Ranges have a size of their own, so no graph depends on how many visual tokens there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from avl_fx.passes.context import PassContext, Size, VisualInputs
from avl_fx.passes.nodes import alias_root, fake, mutated_input, op, same_size, shape, writes_to
from avl_fx.passes.read_ranges import attending
from avl_fx.passes.rewrite import add_input, insert_call, insert_traced
from avl_fx.passes.share_queries import decoder_sites
from avl_fx.passes.site import Site

__all__ = ["key_flags", "new_flags", "new_rows", "past_ranges", "starts_cache"]


def new_flags(gm: fx.GraphModule, ctx: PassContext) -> tuple[fx.Node | None, tuple[str, ...]]:
    """This forward's visual positions, bool ``[batch, queries]``, before any lazy layer; and the names of new inputs.

    ``None``: they are not known, or not that early (features that are added between layers).
    """
    first = _first(ctx)
    inputs = _inputs(gm, ctx, first)
    if inputs.flags is not None or ctx.visual is None:
        return inputs.flags, ()
    shown = ctx.visual.node
    if shown is not None:
        sizes, wanted = shape(shown) or (), shape(first.args[0]) or ()
        fits = len(sizes) == 2 and same_size(sizes[0], wanted[0]) and same_size(sizes[1], wanted[2])
        if not fits or not shown < first:
            return None, ()
        inputs.flags, inputs.shown = shown, _may_ride(gm, wanted[0], wanted[2])
        if not inputs.shown:
            return inputs.flags, ()
    if inputs.batch is None or inputs.queries is None:
        return None, ()
    inputs.new = add_input(gm.graph, "avl_visual", (_batch(first), MAX_SEGMENTS, 2), torch.int64, _query(first))
    inputs.flags = insert_traced(first, _flags, inputs.new, first.args[0])
    if shown is not None:
        inputs.flags = insert_call(first, torch.logical_or, shown, inputs.flags)
    return inputs.flags, (inputs.new.name,)


def past_ranges(gm: fx.GraphModule, ctx: PassContext) -> tuple[fx.Node | None, tuple[str, ...]]:
    """Ranges of the visual keys that were in the cache before, int64 ``[batch, MAX_SEGMENTS, 2]``, empty where nobody
    knows; and the names of new inputs.

    ``None``: no input of the graph tells its batch size.
    """
    first = _first(ctx)
    inputs = _inputs(gm, ctx, first)
    if inputs.past is not None or inputs.batch is None:
        return inputs.past, ()
    inputs.past = add_input(gm.graph, "avl_visual_past", (_batch(first), MAX_SEGMENTS, 2), torch.int64, _query(first))
    return inputs.past, (inputs.past.name,)


def key_flags(gm: fx.GraphModule, ctx: PassContext, site: Site) -> tuple[fx.Node | None, tuple[str, ...]]:
    """Which keys of a prompt's ``site`` are visual, bool ``[batch, keys]``, inserted before it; names of new inputs.

    ``None``: it is not known.
    """
    node = site.node
    assert node is not None
    key = node.args[1]
    assert isinstance(key, fx.Node)
    if starts_cache(key):
        return new_flags(gm, ctx)
    new, added = new_flags(gm, ctx)
    past, more = past_ranges(gm, ctx)
    added += more
    if past is None or (new is None and ctx.visual is not None):
        return None, added
    if new is None:  # a later turn without images
        return insert_traced(node, _flags, past, key), added
    root = alias_root(key)
    if op(root) == "cat":
        earlier = insert_traced(node, _flags, past, root.args[0][0])  # type: ignore[index]
        return insert_call(node, torch.cat, [earlier, new], 1), added
    write = _row_write(root)
    if write is None:
        return None, added
    everywhere = insert_traced(node, _flags, past, key)
    return insert_call(node, torch.index_copy, everywhere, 1, write.args[2], new), added


def starts_cache(key: fx.Node) -> bool:
    """Whether all keys are this forward's own: there was no cache before, or there is none."""
    root = alias_root(key)
    if op(root) == "cat":
        before = shape(root.args[0][0]) or ()  # type: ignore[index]
        return len(before) != 4 or before[2] == 0
    return not writes_to(root)


def new_rows(key: Any) -> fx.Node | None:
    """This forward's rows ``[batch, kv_heads, queries, head_dim]`` among the keys that a site reads.

    ``None``: they were not found.
    """
    root = alias_root(key)
    if op(root) == "cat":
        parts = root.args[0]
        return parts[1] if isinstance(parts, tuple | list) and len(parts) == 2 else None  # type: ignore[return-value]
    write = _row_write(root)
    if write is not None:
        return write.args[3]  # type: ignore[return-value]
    return None if writes_to(root) or root.op == "placeholder" else key


def _row_write(buffer: fx.Node) -> fx.Node | None:
    """The one write of new rows, ``buffer.index_copy_(2, positions, rows)``."""
    writes = writes_to(buffer)
    if len(writes) != 1 or op(writes[0]) != "index_copy_" or mutated_input(writes[0]) is None:
        return None
    write = writes[0]
    return write if len(write.args) == 4 and write.args[1] in (2, -2) else None


def _may_ride(gm: fx.GraphModule, batch: Any, queries: Any) -> bool:
    """Whether an input looks like hidden states ``[batch, queries, hidden]``, on which visual positions ride."""
    shapes = [shape(n) or () for n in gm.graph.nodes if n.op == "placeholder"]
    return any(len(s) == 3 and same_size(s[0], batch) and same_size(s[1], queries) for s in shapes)


def _flags(ranges: Tensor, like: Tensor) -> Tensor:
    """bool ``[batch, rows]``: the rows of ``like`` ``[batch, heads, rows, dim]`` that ``ranges`` name."""
    positions = torch.sub(torch.cumsum(torch.ones_like(like[0, 0, :, 0], dtype=torch.int64), 0), 1)
    start, length = ranges[:, :, None, 0], ranges[:, :, None, 1]
    return torch.logical_and(torch.ge(positions, start), torch.lt(torch.sub(positions, start), length)).any(1)


def _first(ctx: PassContext) -> fx.Node:
    """The first attention of the decoder, which no lazy layer stands before."""
    return attending(next(s for s in decoder_sites(ctx) if s.node is not None))


def _query(attention: fx.Node) -> fx.Node:
    return attention.args[0]  # type: ignore[return-value]


def _batch(node: fx.Node) -> Any:
    """Batch size of an attention node."""
    return (shape(node.args[0]) or (1,))[0]


def _inputs(gm: fx.GraphModule, ctx: PassContext, attention: fx.Node) -> VisualInputs:
    if ctx.visual_inputs is None:
        batch, _, queries, _ = shape(attention.args[0]) or (1, 1, 1, 1)
        starts = starts_cache(attention.args[1])  # type: ignore[arg-type]
        ctx.visual_inputs = VisualInputs(_found(gm, batch), _found(gm, queries), starts)
    return ctx.visual_inputs


def _found(gm: fx.GraphModule, size: Any) -> Size | None:
    """Where a call of the graph finds ``size``; ``None`` when no input has it."""
    if isinstance(size, int):
        return size
    for position, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        value = fake(node)
        if isinstance(value, torch.SymInt) and str(value) == str(size):
            return position, None
        for dim, other in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if str(other) == str(size):
                return position, dim
    return None
