"""Lazy layers take logits that their anchor has computed.

*Decode, mode* ``gla``. `share_queries` let a lazy layer attend with its anchor's query and keys. Their product is the
same in every layer of the block, so the anchor (`avl::anchor_decode`) keeps it, one number for each query head and key,
and the others (`avl::inherited_decode`) read that and their values: a step of a lazy layer costs half of what it cost.
It applies where the earlier stages brought a whole block to `avl::partitioned_decode`, which they do where that pays.
On a GPU nothing else has to speak for it, so there the block is brought here.

*Mode* ``vla``. Prompts are the business of `substitute_visual`, and a stock cache holds what steps read. A compact one
stores no visual keys for a lazy layer: there a step reads its anchor's.

*Mode* ``vla_scores``. Logits against visual keys are the anchor's, those against text keys the layer's own, and one
softmax covers both. A decode step does the same as above, and names the keys that are inherited. A prompt puts both
pairs of queries and keys beside each other: keys are zero in the half that is not theirs, so one product of twice the
head dim gives each logit from the right pair, and a fused kernel can do it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

# Importing the operators registers them.
from avl_fx.kernels import inherited_decode as _inherited_decode  # noqa: F401
from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import alias_root, op
from avl_fx.passes.read_ranges import attending, decodes, read_everything
from avl_fx.passes.rewrite import insert_call, insert_traced, remove_dead
from avl_fx.passes.share_queries import lazy_blocks, same_value
from avl_fx.passes.site import PassResult, Reason, Site
from avl_fx.passes.visual_inputs import key_flags, past_ranges

__all__ = ["inherit_scores"]

_ATTENTION = torch.ops.avl.attention.default
_DECODE = torch.ops.avl.partitioned_decode.default
_QUERY, _KEY, _VALUE, _NEW_KEY, _NEW_VALUE, _MASK, _SEGMENTS, _WEIGH, _SCALE = range(9)


def inherit_scores(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Let lazy sites read their anchor's logits: all of them, or those against visual keys."""
    result = PassResult("inherit_scores")
    policy = ctx.plan.lazy_policy
    if policy is None or (policy.mode == "vla" and ctx.compact is None):
        return result
    for anchor, lazy in lazy_blocks(ctx):
        if policy.mode == "gla":
            _inherit_all(anchor, lazy, result)
        elif policy.mode == "vla":
            _read_theirs(gm, ctx, anchor, lazy, result)
        else:
            _inherit_visual(gm, ctx, anchor, lazy, result)
    remove_dead(gm.graph, ctx.initially_unused, keep=ctx.keep())
    return result


# ---- all logits (gla) ------------------------------------------------------------------------------------------------


def _inherit_all(anchor: Site, lazy: list[Site], result: PassResult) -> None:
    if all(site.device != "cpu" and decodes(site) for site in (anchor, *lazy)):
        for site in (anchor, *lazy):
            read_everything(site)
    theirs = attending(anchor)
    shared = (_QUERY, _KEY, _NEW_KEY, _SEGMENTS)
    heirs = [site for site in lazy if _decode_alike(attending(site), theirs, shared)]
    if heirs:
        logits = _hand_on(theirs)
        for site in heirs:
            arguments: tuple[Any, ...] = attending(site).args
            # Keys that are not read or that the mask hides have logits of -inf.
            values = arguments[_VALUE], None, arguments[_NEW_VALUE], None, arguments[_SEGMENTS], None
            _take(site, logits, None, None, *values)
            site.inherits = "all"
            result.count += 1


def _decode_alike(node: fx.Node, anchor: fx.Node, shared: tuple[int, ...]) -> bool:
    """Whether two decode steps share the arguments ``shared``, the scale and the mask."""
    if node.target is not _DECODE or anchor.target is not _DECODE:
        return False
    same = all(node.args[i] is anchor.args[i] for i in shared)
    return same and node.args[_SCALE] == anchor.args[_SCALE] and same_value(node.args[_MASK], anchor.args[_MASK])


def _hand_on(node: fx.Node) -> fx.Node:
    """Make the anchor keep its logits; returns them."""
    kept = insert_call(node, torch.ops.avl.anchor_decode.default, *node.args)
    node.replace_all_uses_with(kept)
    node.graph.erase_node(node)
    return insert_call(kept.next, operator.getitem, kept, 2)


def _take(site: Site, logits: fx.Node | None, *arguments: Any, anchor_key: fx.Node | None = None) -> None:
    """Let ``site`` attend with ``logits``; ``arguments`` as of `avl::inherited_decode`, from the query on."""
    node = attending(site)
    more = () if anchor_key is None else (anchor_key,)
    out = insert_call(node, torch.ops.avl.inherited_decode.default, logits, *arguments, node.args[_SCALE], *more)
    for part in [user for user in node.users if op(user) == "getitem" and user.args[1] == 0]:
        part.replace_all_uses_with(out)
    site.node = out


# ---- visual keys (vla, compact caches) -------------------------------------------------------------------------------


def _read_theirs(gm: fx.GraphModule, ctx: PassContext, anchor: Site, lazy: list[Site], result: PassResult) -> None:
    heirs = [site for site in lazy if attending(site).target is _DECODE and attending(anchor).target is _DECODE]
    if not heirs:
        return
    inherited, added = past_ranges(gm, ctx)
    result.new_inputs += added
    for site in heirs:
        if inherited is None:
            result.refuse(site, Reason.VISUAL_UNKNOWN)
            continue
        _may_be_short(gm, ctx, site)
        query, key, value, new_key, new_value, mask, segments, _, _ = attending(site).args
        theirs: Any = attending(anchor).args[_KEY]
        arguments = query, key, value, new_key, new_value, mask, segments, inherited
        _take(site, None, *arguments, anchor_key=theirs)
        result.count += 1


def _may_be_short(gm: fx.GraphModule, ctx: PassContext, site: Site) -> None:
    """Take note that the keys of ``site``, a decode step's, may lack visual rows in a compact cache."""
    if ctx.compact is None:
        return
    root = alias_root(attending(site).args[_KEY])  # type: ignore[arg-type]
    stored = alias_root(root.args[0][0]) if op(root) == "cat" else root  # type: ignore[index, arg-type]
    if stored.op == "placeholder":
        ctx.compact.short[[n for n in gm.graph.nodes if n.op == "placeholder"].index(stored)] = site


# ---- logits against visual keys (vla_scores) -------------------------------------------------------------------------


def _inherit_visual(gm: fx.GraphModule, ctx: PassContext, anchor: Site, lazy: list[Site], result: PassResult) -> None:
    heirs = [site for site in lazy if _decode_alike(attending(site), attending(anchor), (_SEGMENTS,))]
    if heirs:
        inherited, added = past_ranges(gm, ctx)
        result.new_inputs += added
        if inherited is None:
            for site in heirs:
                result.refuse(site, Reason.VISUAL_UNKNOWN)
            return
        logits = _hand_on(attending(anchor))
        for site in heirs:
            _may_be_short(gm, ctx, site)
            query, key, value, new_key, new_value, mask, segments, _, _ = attending(site).args
            _take(site, logits, query, key, value, new_key, new_value, mask, segments, inherited)
            site.inherits = "visual"
            result.count += 1
    for site in lazy:
        if site not in heirs:
            _inherit_prompt(gm, ctx, site, anchor, result)


def _inherit_prompt(gm: fx.GraphModule, ctx: PassContext, site: Site, anchor: Site, result: PassResult) -> None:
    node, theirs = site.node, anchor.node
    if node is None or theirs is None or node.target is not _ATTENTION or theirs.target is not _ATTENTION:
        result.refuse(site, Reason.ANCHOR_GEOMETRY, "its anchor attends by another kernel")
        return
    flags, added = key_flags(gm, ctx, site)
    result.new_inputs += added
    if flags is None:
        result.refuse(site, Reason.VISUAL_UNKNOWN)
        return
    query = insert_call(node, torch.cat, [node.args[_QUERY], theirs.args[_QUERY]], -1)
    key = insert_traced(node, _beside, flags, node.args[_KEY], theirs.args[_KEY])
    node.update_arg(_QUERY, query)
    node.update_arg(_KEY, key)
    site.inherits = "visual"
    result.count += 1


def _beside(flags: Tensor, own: Tensor, theirs: Tensor) -> Tensor:
    """Keys ``[batch, kv_heads, keys, 2 * head_dim]``: ``own`` without those at ``flags``, ``theirs`` at them alone."""
    visual = flags[:, None, :, None]
    return torch.cat([own.masked_fill(visual, 0.0), theirs.masked_fill(torch.logical_not(visual), 0.0)], -1)
