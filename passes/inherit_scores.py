"""Stage 8: in a decode step the anchor of a lazy block hands on its logits, and lazy layers read no keys.

`share_queries` let a lazy layer attend with its anchor's query and keys. Their product is the same in every layer of
the block, so the anchor (`avl::anchor_decode`) keeps it, one number for each query head and key, and the others
(`avl::inherited_decode`) read that and their values: a step of a lazy layer costs half of what it cost.

It applies where the earlier stages brought a whole block to `avl::partitioned_decode`, which they do where that pays.
On a GPU nothing else has to speak for it, so there the block is brought here.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

# Importing the operators registers them.
from avl_fx.kernels import inherited_decode as _inherited_decode  # noqa: F401
from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import op
from avl_fx.passes.read_ranges import attending, decodes, read_everything
from avl_fx.passes.rewrite import insert_call, remove_dead
from avl_fx.passes.share_queries import decoder_sites, same_value
from avl_fx.passes.site import PassResult, Site, Status

__all__ = ["inherit_scores"]

_DECODE = torch.ops.avl.partitioned_decode.default
_QUERY, _KEY, _VALUE, _NEW_KEY, _NEW_VALUE, _MASK, _SEGMENTS, _WEIGH, _SCALE = range(9)


def inherit_scores(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Let the lazy sites of one query read their anchor's logits."""
    result = PassResult("inherit_scores")
    if ctx.plan.lazy_policy is None:
        return result
    for anchor, lazy in _blocks(ctx):
        if all(site.device != "cpu" and decodes(site) for site in (anchor, *lazy)):
            for site in (anchor, *lazy):
                read_everything(site)
        theirs = attending(anchor)
        heirs = [site for site in lazy if _same_logits(attending(site), theirs)]
        if theirs.target is not _DECODE or not heirs:
            continue
        logits = _hand_on(theirs)
        for site in heirs:
            _inherit(site, logits)
            result.count += 1
    remove_dead(gm.graph, ctx.initially_unused, keep=ctx.keep())
    return result


def _blocks(ctx: PassContext) -> list[tuple[Site, list[Site]]]:
    """Anchors with their lazy sites, as `share_queries` made them."""
    policy = ctx.plan.lazy_policy
    assert policy is not None
    by_layer: dict[tuple[str | None, int], Site] = {}
    lazy: dict[tuple[str | None, int], list[Site]] = defaultdict(list)
    for site in decoder_sites(ctx):
        if site.node is None or site.layer is None or site.status is Status.REFUSED:
            continue
        if site.action.startswith("lazy"):
            anchor = policy.anchor_of(site.layer)
            assert anchor is not None
            lazy[site.tower, anchor].append(site)
        elif site.action.startswith("anchor"):
            by_layer[site.tower, site.layer] = site
    return [(by_layer[at], sites) for at, sites in lazy.items() if at in by_layer]


def _same_logits(node: fx.Node, anchor: fx.Node) -> bool:
    """Whether two nodes attend with one query to the same keys, and with the same mask."""
    if node.target is not _DECODE or anchor.target is not _DECODE:
        return False
    same = all(node.args[i] is anchor.args[i] for i in (_QUERY, _KEY, _NEW_KEY, _SEGMENTS))
    return same and node.args[_SCALE] == anchor.args[_SCALE] and same_value(node.args[_MASK], anchor.args[_MASK])


def _hand_on(node: fx.Node) -> fx.Node:
    """Make the anchor keep its logits; returns them."""
    kept = insert_call(node, torch.ops.avl.anchor_decode.default, *node.args)
    node.replace_all_uses_with(kept)
    node.graph.erase_node(node)
    return insert_call(kept.next, operator.getitem, kept, 2)


def _inherit(site: Site, logits: fx.Node) -> None:
    node = attending(site)
    arguments: tuple[Any, ...] = node.args
    # Keys that are not read or that the mask hides have logits of -inf.
    out = insert_call(
        node,
        torch.ops.avl.inherited_decode.default,
        *(logits, None, None, arguments[_VALUE], None, arguments[_NEW_VALUE], None, arguments[_SEGMENTS], None),
        arguments[_SCALE],
    )
    for part in [user for user in node.users if op(user) == "getitem" and user.args[1] == 0]:
        part.replace_all_uses_with(out)
    site.node = out
