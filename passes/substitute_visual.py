"""Lazy layers take their anchor's queries and keys at visual positions (arXiv 2602.01901, mode ``vla``).

A prompt's graph replaces them where they are made, before the cache takes the keys. So what the cache of a lazy layer
holds at visual positions are its anchor's keys, and a decode step, whose query is text, needs nothing more.

The projections of a lazy layer run on all positions: which of them are text differs from batch row to batch row, and a
product over those alone would need sizes that depend on data.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import fake, same_shape, writes_to
from avl_fx.passes.rewrite import insert_traced, remove_dead
from avl_fx.passes.share_queries import lazy_blocks
from avl_fx.passes.site import PassResult, Reason, Site
from avl_fx.passes.visual_inputs import new_flags, new_rows, starts_cache

__all__ = ["substitute_visual"]

_QUERY, _KEY = 0, 1


def substitute_visual(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Rewrite the prompts of lazy sites in mode ``vla``."""
    result = PassResult("substitute_visual")
    policy = ctx.plan.lazy_policy
    if policy is None or policy.mode != "vla":
        return result
    for anchor, lazy in lazy_blocks(ctx):
        for site in lazy:
            if _decodes(site):
                continue
            flags, added = new_flags(gm, ctx)
            result.new_inputs += added
            if flags is None and _continues(ctx, site):
                result.count += 1
                continue
            if flags is None:
                result.refuse(site, Reason.VISUAL_UNKNOWN)
                continue
            if not _substitute(site, anchor, flags):
                result.refuse(site, Reason.NEW_ROWS)
                continue
            result.count += 1
    remove_dead(gm.graph, ctx.initially_unused, keep=ctx.keep())
    return result


def _decodes(site: Site) -> bool:
    """Whether this is a step of one token, which is text."""
    assert site.node is not None
    return site.queries == 1 and not starts_cache(site.node.args[_KEY])  # type: ignore[arg-type]


def _continues(ctx: PassContext, site: Site) -> bool:
    """Whether this is a later turn without images: at visual positions the cache holds what its anchor has already."""
    assert site.node is not None
    return ctx.visual is None and not starts_cache(site.node.args[_KEY])  # type: ignore[arg-type]


def _substitute(site: Site, anchor: Site, flags: fx.Node) -> bool:
    """Let ``site`` take what its ``anchor`` has at ``flags`` bool ``[batch, queries]``; ``False`` changes nothing."""
    assert site.node is not None
    assert anchor.node is not None
    own, theirs = new_rows(site.node.args[_KEY]), new_rows(anchor.node.args[_KEY])
    if own is None or theirs is None or not same_shape(own, theirs) or fake(own).dtype != fake(theirs).dtype:
        return False
    if writes_to(own) or writes_to(theirs):
        return False
    rows = insert_traced(own.next, _where, flags, theirs, own)
    own.replace_all_uses_with(rows, delete_user_cb=lambda user: user is not rows)
    query = insert_traced(site.node, _where, flags, anchor.node.args[_QUERY], site.node.args[_QUERY])
    site.node.update_arg(_QUERY, query)
    return True


def _where(flags: Tensor, theirs: Tensor, own: Tensor) -> Tensor:
    """``theirs`` ``[batch, heads, queries, dim]`` at ``flags``, ``own`` elsewhere."""
    return torch.where(flags[:, None, :, None], theirs, own)
