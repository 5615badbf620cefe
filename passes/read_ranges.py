"""Lets decode sites read the key ranges that inputs of the graph name, through `avl::partitioned_decode`.

Two stages need it: one that reads less (`partition_modalities`), one that stores the new row on the way
(`append_in_place`).
"""

from __future__ import annotations

import operator

import torch
from torch import fx

# Importing the operator registers it.
from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from avl_fx.passes.context import KeyRanges, PassContext
from avl_fx.passes.nodes import shape
from avl_fx.passes.rewrite import add_input, insert_call
from avl_fx.passes.site import Site

__all__ = ["read_ranges", "take_ranges"]


def take_ranges(gm: fx.GraphModule, ctx: PassContext, site: Site) -> tuple[str, ...]:
    """Append the inputs of ``ctx.ranges`` unless the graph has them; returns the names of new ones."""
    if ctx.ranges is not None:
        return ()
    assert site.node is not None
    query = site.node.args[0]
    assert isinstance(query, fx.Node)
    batch = (shape(query) or (1,))[0]
    segments = add_input(gm.graph, "avl_segments", (batch, MAX_SEGMENTS, 2), torch.int64, query)
    weigh = add_input(gm.graph, "avl_weigh", (1,), torch.int32, query)
    ctx.ranges = KeyRanges(segments, weigh)
    return segments.name, weigh.name


def read_ranges(site: Site, ctx: PassContext) -> fx.Node:
    """Replace the canonical node of ``site``, of one query, by `avl::partitioned_decode`; returns its weights."""
    node = site.node
    assert node is not None
    assert ctx.ranges is not None
    query, key, value, mask, scale, _, _ = node.args
    both = insert_call(
        node,
        torch.ops.avl.partitioned_decode.default,
        *(query, key, value, None, None, mask, ctx.ranges.segments, ctx.ranges.weigh, scale),
    )
    out = insert_call(node, operator.getitem, both, 0)
    weights = insert_call(node, operator.getitem, both, 1)
    node.replace_all_uses_with(out)
    site.node = out
    return weights
