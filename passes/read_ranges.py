"""Lets decode sites attend through `avl::partitioned_decode`: to the key ranges that inputs of the graph name, or all.

Three stages need it: one that reads less (`partition_modalities`), one that stores the new row on the way
(`append_in_place`), and one that reads each key once for a group of query heads (`read_once`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

# Importing the operators registers them.
from avl_fx.kernels import latent_decode as _latent_decode  # noqa: F401
from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from avl_fx.passes.context import KeyRanges, PassContext
from avl_fx.passes.latents import latents_of
from avl_fx.passes.nodes import fake, op, shape
from avl_fx.passes.rewrite import add_input, insert_call
from avl_fx.passes.site import Site, Status

__all__ = ["attending", "decoded_latents", "decodes", "read_everything", "read_ranges", "take_ranges", "takes"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def takes(query: Any) -> bool:
    """Whether `avl::partitioned_decode` takes a query like this tensor; it has no gradient."""
    return query.dtype in _DTYPES and not query.requires_grad


def attending(site: Site) -> fx.Node:
    """The node that reads keys and values: canonical, or `avl::partitioned_decode` or its like, which return a pair."""
    node = site.node
    assert node is not None
    return node.args[0] if op(node) == "getitem" else node  # type: ignore[return-value]


def decodes(site: Site) -> bool:
    """Whether `avl::partitioned_decode` over every key means the same as the canonical node of ``site``."""
    node = site.node
    if node is None or node.target is not torch.ops.avl.attention.default or site.queries != 1:
        return False
    *tensors, scale, is_causal, _ = node.args
    query, key, value, mask = map(fake, tensors)
    # The flag is aligned with the first key: one query would see that one alone.
    if is_causal or not isinstance(scale, float) or not takes(query):
        return False
    if any(t is not None and t.requires_grad for t in (key, value, mask)) or (mask is not None and mask.dim() > 4):
        return False
    return all(isinstance(t.stride(3), int) and t.stride(3) == 1 for t in (key, value))


def decoded_latents(site: Site) -> tuple[fx.Node, fx.Node] | None:
    """What `avl::latent_decode` would take in place of the keys and values of ``site``, canonical so far.

    ``None`` in a lazy block: its layers share the logits of keys as a whole.
    """
    in_block = site.anchor is not None or site.action == "anchor"
    return None if in_block and site.status is not Status.REFUSED else latents_of(site)


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
    """Replace the canonical node of ``site``, of one query, by `avl::partitioned_decode`, or `avl::latent_decode` where
    it attends to latents; returns the weights."""
    assert ctx.ranges is not None
    return _attend(site, ctx.ranges.segments, ctx.ranges.weigh)


def read_everything(site: Site) -> None:
    """Replace the canonical node of ``site``, of which `decodes` holds, by `avl::partitioned_decode` over every key."""
    _attend(site, None, None)


def _attend(site: Site, segments: fx.Node | None, weigh: fx.Node | None) -> fx.Node:
    node = site.node
    assert node is not None
    query, key, value, mask, scale, _, _ = node.args
    latents = decoded_latents(site)
    target, rows = torch.ops.avl.partitioned_decode.default, (key, value)
    if latents is not None:
        target, rows = torch.ops.avl.latent_decode.default, latents
    both = insert_call(node, target, query, *rows, None, None, mask, segments, weigh, scale)
    out = insert_call(node, operator.getitem, both, 0)
    weights = insert_call(node, operator.getitem, both, 1)
    node.replace_all_uses_with(out)
    site.node = out
    return weights
