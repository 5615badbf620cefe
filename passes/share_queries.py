"""Which layers are lazy, and what they read of their anchor (Q Cache, arXiv 2602.01901).

In a lazy block the first layer is the anchor. Every other layer keeps its own values, mask and output projection. In
mode ``gla`` it attends with the anchor's query and key. What only fed its own query and key (projections, norms, RoPE,
the key write of its cache) is then dead and removed.

The keys of such a layer are *not stored*. Where the graph returned them, the rewritten graph returns nothing and the
runtime puts a marker (see `avl_fx.dropped_keys`); where it wrote them into a static buffer, the write goes.

In the modes ``vla`` and ``vla_scores`` a lazy layer inherits at visual positions only. This stage says which layers
may; `substitute_visual` and `inherit_scores` rewrite them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from avl_fx.passes.context import PassContext
from avl_fx.passes.drop_keys import drop_keys, readers
from avl_fx.passes.nodes import alias_root, fake, mutated_input, op, written_between
from avl_fx.passes.rewrite import remove_dead
from avl_fx.passes.site import PassResult, Reason, Site, Status

__all__ = ["DECODER_ROLES", "decoder_sites", "lazy_blocks", "same_value", "share_queries", "why_not"]

DECODER_ROLES = ("decoder", "cross")
"""Roles of sites that the plan's layer numbers mean."""

_QUERY, _KEY, _VALUE, _MASK, _SCALE, _CAUSAL = range(6)
_PRODUCTS = frozenset({"linear", "addmm", "matmul", "bmm", "einsum"})
_SEARCH_LIMIT = 400
_ONE_MASK = frozenset({"full", "sliding", "chunked"})
"""Kinds whose mask follows from positions alone."""


def share_queries(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Apply ``ctx.plan.lazy_policy`` to the decoder's sites."""
    result = PassResult("share_queries")
    policy = ctx.plan.lazy_policy
    if policy is None:
        return result
    by_layer = _by_layer(ctx)
    removable: list[fx.Node] = []
    for site in decoder_sites(ctx):
        anchor_layer = None if site.layer is None else policy.anchor_of(site.layer)
        if site.layer is None:
            result.refuse(site, Reason.LAYER_UNKNOWN)
        elif anchor_layer is not None and site.status is not Status.REFUSED:
            candidates = [s for s in by_layer.get(anchor_layer, []) if s.tower == site.tower]
            anchor = candidates[0] if len(candidates) == 1 else None
            refusal = why_not(site, anchor)
            if len(candidates) > 1:  # the layer runs more than once, or attends more than once
                refusal = Reason.LAYER_UNKNOWN, f"{len(candidates)} calls share the number of its anchor"
            elif anchor is None and anchor_layer in ctx.without_attention:
                refusal = Reason.ANCHOR_KIND, f"layer {anchor_layer} has no attention"
            if refusal is None and policy.mode != "gla" and site.kind != "full":
                refusal = Reason.POSITION_MASK, site.kind
            if refusal is None and policy.mode != "gla":
                refusal = _read_by_others(site, ctx)
            if refusal is not None:
                result.refuse(site, *refusal)
                continue
            assert anchor is not None
            refusal = _share(gm, site, anchor, ctx, removable) if policy.mode == "gla" else None
            if refusal is not None:
                result.refuse(site, *refusal)
                continue
            words = "" if policy.mode == "gla" else f", {policy.mode}"
            site.status, site.action = Status.REWRITTEN, f"lazy{words} (anchor {anchor_layer})"
            site.anchor = anchor_layer
            anchor.status, anchor.action = Status.REWRITTEN, "anchor"
            result.count += 1
    result.dropped_mutations = tuple(remove_dead(gm.graph, ctx.initially_unused, removable, ctx.keep()))
    return result


def decoder_sites(ctx: PassContext) -> list[Site]:
    """Sites of the language decoder, cross-attention included; the plan's layer numbers mean these."""
    towers = {s.tower for s in ctx.sites if s.role == "decoder"}
    return [s for s in ctx.sites if s.role in DECODER_ROLES and s.tower in towers]


def _read_by_others(site: Site, ctx: PassContext) -> tuple[Reason, str] | None:
    """Who besides ``site`` reads its keys: a layer without a cache, in whatever way it attends, or what stores them."""
    assert site.node is not None
    others = {reader for reader in readers(alias_root(site.node.args[_KEY])) if reader is not site.node}  # type: ignore[arg-type]
    if not others:
        return None
    attention = others & {other.node for other in decoder_sites(ctx)}
    return (Reason.ANCHOR_KEYS, "") if attention else (Reason.KEYS_ESCAPE, "something else reads them")


def lazy_blocks(ctx: PassContext) -> list[tuple[Site, list[Site]]]:
    """Anchors with their lazy sites, as this stage left them; without sites that a later one refused."""
    anchors: dict[tuple[str | None, int], Site] = {}
    lazy: dict[tuple[str | None, int], list[Site]] = defaultdict(list)
    for site in decoder_sites(ctx):
        if site.node is None or site.layer is None or site.status is Status.REFUSED:
            continue
        if site.anchor is not None:
            lazy[site.tower, site.anchor].append(site)
        elif site.action.startswith("anchor"):
            anchors[site.tower, site.layer] = site
    return [(anchors[at], sites) for at, sites in lazy.items() if at in anchors]


def _by_layer(ctx: PassContext) -> dict[int, list[Site]]:
    found: dict[int, list[Site]] = defaultdict(list)
    for site in decoder_sites(ctx):
        if site.layer is not None:
            found[site.layer].append(site)
    return found


def why_not(site: Site, anchor: Site | None) -> tuple[Reason, str] | None:
    """Why ``site`` cannot inherit from ``anchor``; ``None`` when it can."""
    if anchor is None:
        return Reason.ANCHOR_ELSEWHERE, "compile the whole decoder as one graph: avl_fx.compile(model, plan=...)"
    if site.kind == "cross" or anchor.kind != site.kind:
        return Reason.ANCHOR_KIND, f"{site.kind}, anchor {anchor.kind}"
    if _copies(site):
        # In its prompt's graph these are keys that escape: there the layer is dense, too.
        return Reason.NOT_THE_CACHE, "its keys are copies of what is stored"
    if site.kind not in _ONE_MASK:
        # A prompt within its budget may show the same mask, and a later step not.
        return Reason.ANCHOR_MASK, f"{site.kind}: each layer may choose its own keys"
    if anchor.status is Status.REFUSED or anchor.node is None or site.node is None:
        return Reason.ANCHOR_REFUSED, str(anchor.reason)
    own = (site.heads, site.kv_heads, site.head_dim, site.dtype, site.batch, site.queries)
    theirs = (anchor.heads, anchor.kv_heads, anchor.head_dim, anchor.dtype, anchor.batch, anchor.queries)
    if own != theirs:
        return Reason.ANCHOR_GEOMETRY, f"{own}, anchor {theirs}"
    if isinstance(site.keys, int) and isinstance(anchor.keys, int) and site.keys != anchor.keys:
        return Reason.ANCHOR_GEOMETRY, f"{site.keys} keys, anchor {anchor.keys}"
    if site.node.args[_SCALE] != anchor.node.args[_SCALE]:
        return Reason.ANCHOR_SCALE, f"{site.node.args[_SCALE]}, anchor {anchor.node.args[_SCALE]}"
    if site.node.args[_CAUSAL] != anchor.node.args[_CAUSAL] or not same_value(
        site.node.args[_MASK], anchor.node.args[_MASK]
    ):
        return Reason.ANCHOR_MASK, ""
    read = (anchor.node.args[_QUERY], anchor.node.args[_KEY])
    if any(written_between(tensor, anchor.node.next, site.node) for tensor in read):  # type: ignore[arg-type]
        return Reason.MUTATION, "the anchor's keys are written again before the lazy layer"
    return None


def _copies(site: Site) -> bool:
    """Whether keys are computed from numbers of 8 bits, as a quantised cache stores them and hands them out.

    Latents are projected first, quantised or not: their keys are made anew.
    """
    if site.cache != "none" or site.node is None:
        return False
    seen: set[fx.Node] = set()
    pending = [site.node.args[_KEY]]
    while pending and len(seen) < _SEARCH_LIMIT:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen or op(node) in _PRODUCTS:
            continue
        seen.add(node)
        value = fake(node)
        if isinstance(value, torch.Tensor) and value.dtype.itemsize == 1 and value.dtype != torch.bool:
            return True
        pending += node.all_input_nodes
    return False


def same_value(a: Any, b: Any, depth: int = 6) -> bool:
    """Whether two arguments are the same value: one node, or the same operators on the same nodes."""
    if a is b:
        return True
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        if depth == 0 or a.op != b.op or a.target != b.target or a.op == "placeholder":
            return False
        if mutated_input(a) is not None or mutated_input(b) is not None:
            return False
        return same_value((a.args, a.kwargs), (b.args, b.kwargs), depth - 1)
    if isinstance(a, slice) and isinstance(b, slice):
        if (a.start, a.step) != (b.start, b.step):
            return False
        # `mask[..., :keys]`: both lengths are the layer's own key count, and those have to agree for the attention.
        return a.stop is b.stop or a.stop == b.stop or not (isinstance(a.stop, int) or isinstance(b.stop, int))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same_value(x, y, depth) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[k], b[k], depth) for k in a)
    return type(a) is type(b) and bool(a == b)


def _share(
    gm: fx.GraphModule, site: Site, anchor: Site, ctx: PassContext, removable: list[fx.Node]
) -> tuple[Reason, str] | None:
    """Point ``site`` at the anchor's query and key and let go of its own keys; undone when those escape."""
    assert site.node is not None
    assert anchor.node is not None
    own_query, own_key = site.node.args[_QUERY], site.node.args[_KEY]
    assert isinstance(own_key, fx.Node)
    if own_key is anchor.node.args[_KEY]:  # a layer without a cache, which reads what its anchor stores
        site.node.update_arg(_QUERY, anchor.node.args[_QUERY])
        return None
    value = site.node.args[_VALUE]
    site.node.update_arg(_QUERY, anchor.node.args[_QUERY])
    site.node.update_arg(_KEY, anchor.node.args[_KEY])
    refusal = drop_keys(gm, site, own_key, value, ctx, removable)  # type: ignore[arg-type]
    if refusal is not None:
        site.node.update_arg(_QUERY, own_query)
        site.node.update_arg(_KEY, own_key)
    return refusal
