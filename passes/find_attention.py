"""Every attention call becomes one `avl::attention` node that means exactly what it replaced.

Anchor and walk, never enumerate: the anchor is an SDPA call, or a softmax whose result is multiplied with something.
From the anchor the walk goes outwards over whatever the model put there (casts, scale, mask, dropout that does nothing,
`repeat_kv`), one step at a time. A step that is not understood refuses the site with a named reason and leaves the
model's own nodes untouched.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from avl_fx.kernels.attention import LOWERINGS
from avl_fx.passes.context import PassContext
from avl_fx.passes.describe import describe_site
from avl_fx.passes.library_kernels import LibraryCall, library_attention
from avl_fx.passes.nodes import arg, const, fake, loses_gradient, number, op, same_size, shape, written_between
from avl_fx.passes.rewrite import insert_call, remove_dead
from avl_fx.passes.site import PassResult, Reason, Site, Status
from avl_fx.passes.softmax_pattern import NotAttention, Refusal, match_softmax
from avl_fx.passes.unrepeat import unrepeat

__all__ = ["find_attention"]


def find_attention(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Rewrite every recognised attention call of ``gm`` in place and record all sites in ``ctx.sites``."""
    result = PassResult("find_attention")
    for node in list(gm.graph.nodes):
        name = "" if node in ctx.initially_unused else op(node)
        if name == "scaled_dot_product_attention":
            _sdpa_site(node, ctx, result)
        elif name == "softmax":
            _softmax_site(node, ctx, result)
        elif name == "flex_attention":
            site = _new_site(node, "flex", ctx)
            describe_site(site, node, node.args[0], node.args[1], node.args[2], ctx)
            result.refuse(site, Reason.FLEX)
        elif name and (call := library_attention(node)) is not None:
            _library_site(call, ctx, result)
    # Logits that were scaled or masked in place are gone with the rest of the model's own spelling.
    result.dropped_mutations = tuple(remove_dead(gm.graph, ctx.initially_unused))
    return result


def _new_site(node: fx.Node, style: str, ctx: PassContext) -> Site:
    site = Site(index=len(ctx.sites), style=style, node=node)
    ctx.sites.append(site)
    return site


def _sdpa_site(node: fx.Node, ctx: PassContext, result: PassResult) -> None:
    query, key, value = (arg(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask = arg(node, 3, "attn_mask")
    dropout = arg(node, 4, "dropout_p", 0.0)
    is_causal = arg(node, 5, "is_causal", False)
    scale = arg(node, 6, "scale")
    grouped = arg(node, 7, "enable_gqa", False)
    site = _new_site(node, "sdpa", ctx)
    site.mask = _mask_kind(mask, is_causal)
    if const(dropout) != 0.0:
        describe_site(site, node, query, key, value, ctx)
        result.refuse(site, Reason.DROPOUT)
        return
    factor = number(scale)
    if scale is not None and factor is None:
        describe_site(site, node, query, key, value, ctx)
        result.refuse(site, Reason.LOGITS, "scale is not a number")
        return
    if not isinstance(is_causal, bool) or (mask is not None and is_causal):
        describe_site(site, node, query, key, value, ctx)
        result.refuse(site, Reason.MASK, "is_causal is symbolic or comes with a mask")
        return
    _canonicalise(site, node, node, query, key, value, mask, factor, is_causal, bool(grouped), ctx, result)


def _library_site(call: LibraryCall, ctx: PassContext, result: PassResult) -> None:
    site = _new_site(call.node, "library", ctx)
    query, key, value = call.operands()
    # The call of SDPA that is made of it has to be one that SDPA takes.
    refusal = call.refusal() or _check_shapes(site, query, query, key, value, None, True)
    if refusal is None:
        sdpa = call.as_sdpa(query, key, value)
        scale, is_causal = sdpa.kwargs["scale"], sdpa.kwargs["is_causal"]
        site.mask = _mask_kind(None, is_causal)
        _canonicalise(site, sdpa, sdpa, query, key, value, None, scale, is_causal, True, ctx, result)  # type: ignore[arg-type]
    else:
        describe_site(site, call.node, query, key, value, ctx)
        result.refuse(site, *refusal)
    if site.status is Status.REFUSED:
        site.node = call.node  # what was inserted in front is used by nothing, and goes with the rest
    else:
        assert site.node is not None
        call.replace(site.node)


def _softmax_site(node: fx.Node, ctx: PassContext, result: PassResult) -> None:
    try:
        match = match_softmax(node)
    except NotAttention:
        return
    except Refusal as refusal:
        site = _new_site(node, "softmax", ctx)
        describe_site(site, node, None, None, refusal.value, ctx)
        result.refuse(site, refusal.reason, refusal.detail)
        return
    site = _new_site(match.output, "softmax", ctx)
    mask = match.build_mask()
    site.mask = _mask_kind(mask, False)
    query, key, value, scale = match.query, match.key(), match.value, match.scale
    _canonicalise(
        site, match.output, match.product, query, key, value, mask, scale, False, False, ctx, result, match.mask_source
    )


def _mask_kind(mask: Any, is_causal: Any) -> str:
    if mask is None:
        return "causal" if is_causal else "none"
    value = fake(mask)
    return "bool" if isinstance(value, torch.Tensor) and value.dtype == torch.bool else "additive"


def _canonicalise(
    site: Site,
    anchor: fx.Node,
    first: fx.Node,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    mask: fx.Node | None,
    scale: float | None,
    is_causal: bool,
    grouped: bool,
    ctx: PassContext,
    result: PassResult,
    mask_source: fx.Node | None = None,
) -> None:
    """Replace ``anchor`` by an `avl::attention` node, or refuse ``site`` and touch nothing.

    ``first`` is where the model starts to read query, key and mask; the canonical node reads them all at ``anchor``.
    ``mask_source`` is what the model reads where that is not ``mask`` itself.
    """
    refusal = _check_shapes(site, anchor, query, key, value, mask, grouped)
    if refusal is not None:
        describe_site(site, anchor, query, key, value, ctx)
        result.refuse(site, *refusal)
        return
    query_shape = shape(query)
    assert query_shape is not None
    heads = query_shape[1]
    plain_key, plain_value = unrepeat(key, anchor), unrepeat(value, anchor)
    mask_source = mask if mask_source is None else mask_source
    readings = [(query, first), (key, first), (value, anchor), (mask_source, first)]
    pairs = ((key, plain_key), (value, plain_value))
    readings += [(plain, _first_copy(node, plain)) for node, plain in pairs if plain is not node]
    # Of a node that was inserted the model has the inputs.
    kept = {query, mask_source, *(n for plain in (plain_key, plain_value) for n in (plain, *plain.all_input_nodes))}
    refusal = None
    if any(tensor is not None and written_between(tensor, since, anchor) for tensor, since in readings):
        refusal = Reason.MUTATION, ""
    elif any(map(loses_gradient, _replaced(anchor, kept))):
        refusal = Reason.GRADIENT, "part of it runs under no_grad"
    if refusal is not None:
        describe_site(site, anchor, query, key, value, ctx)
        result.refuse(site, *refusal)
        return
    if shape(plain_key)[1] == shape(plain_value)[1]:  # type: ignore[index]
        site.unrepeated = plain_key is not key
        key, value = plain_key, plain_value
    computed = _autocast_dtype(site, anchor, query, key, value)
    if computed is not None:
        query, key, value = (
            x if fake(x).dtype == computed else insert_call(anchor, "to", x, computed) for x in (query, key, value)
        )
    describe_site(site, anchor, query, key, value, ctx)
    if heads % site.kv_heads:
        result.refuse(site, Reason.HEADS, f"{heads} query heads over {site.kv_heads} key heads")
        return
    if site.device not in LOWERINGS:
        result.refuse(site, Reason.DEVICE, site.device)
        return
    site.scale = 1.0 / math.sqrt(site.head_dim) if scale is None else scale
    canonical = insert_call(
        anchor, torch.ops.avl.attention.default, query, key, value, mask, site.scale, is_causal, site.index
    )
    anchor.replace_all_uses_with(canonical)
    site.node = canonical
    result.count += 1


def _replaced(anchor: fx.Node, kept: set[fx.Node | None]) -> list[fx.Node]:
    """What the canonical node stands for besides ``anchor``: all that leads to it from what is ``kept``."""
    found: dict[fx.Node, None] = {}
    pending = list(anchor.all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in kept and node not in found:
            found[node] = None
            pending += node.all_input_nodes
    return list(found)


def _first_copy(node: fx.Node, plain: fx.Node) -> fx.Node:
    """The first node that `unrepeat` looked through on its way from ``node`` to ``plain``."""
    sources = {plain, *plain.all_input_nodes}
    while node.args[0] not in sources:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _autocast_dtype(site: Site, anchor: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node) -> torch.dtype | None:
    """What autocast computes a call of SDPA in: it casts what the call is given. ``None``: there is nothing to cast.

    The operator itself wants one dtype and returns it, so that another dtype of the result tells. Of a softmax between
    products nothing does: the model may have asked for each dtype itself.
    """
    given = {fake(x).dtype for x in (query, key, value)}
    result: torch.dtype = fake(anchor).dtype
    half = (torch.float16, torch.bfloat16)
    autocast = site.style == "sdpa" and result in half and given <= {torch.float32, *half} and given != {result}
    return result if autocast else None


def _check_shapes(
    site: Site, anchor: fx.Node, query: Any, key: Any, value: Any, mask: Any, grouped: bool
) -> tuple[Reason, str] | None:
    shapes = [shape(x) for x in (query, key, value)]
    if any(s is None or len(s) != 4 for s in shapes):
        return Reason.RANK, ", ".join("?" if s is None else f"{len(s)}-d" for s in shapes)
    (qb, qh, _, qd), (kb, kh, _, kd), (vb, vh, _, vd) = shapes  # type: ignore[misc]
    if not (same_size(qb, kb) and same_size(qb, vb)):
        return Reason.BROADCAST, f"{qb}, {kb}, {vb}"
    if not all(isinstance(size, int) for size in (qh, kh, vh, qd, kd, vd)) or kd != qd:
        return Reason.HEADS, f"{qh}, {kh}, {vh}"
    # One key head is broadcast to all query heads, grouped or not.
    if kh != vh or (not grouped and kh not in (1, qh)):
        return Reason.HEADS, f"{qh}, {kh}, {vh}"
    dtypes = [fake(x).dtype for x in (query, key, value, anchor)]
    if len(set(dtypes)) != 1 and _autocast_dtype(site, anchor, query, key, value) is None:
        return Reason.DTYPE, ", ".join(map(str, dtypes))
    if mask is not None:
        mask_value = fake(mask)
        if not isinstance(mask_value, torch.Tensor) or mask_value.dim() > 4:
            return Reason.MASK, "not a tensor of at most 4 dimensions"
        if not (mask_value.dtype == torch.bool or mask_value.dtype.is_floating_point):
            return Reason.MASK, f"dtype {mask_value.dtype}"
    return None
