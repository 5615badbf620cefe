"""Latent attention reads its latents as they lie instead of making keys and values of them.

A layer of multi-head latent attention (`avl_fx.passes.latents`) stores one row of latents a token for all heads, and a
decode step of its model expands *all* of them: a product of every stored token with the whole projection, for one
query. But a product of products may be taken in another order (DeepSeek-V2, arXiv 2405.04434, section 2.1.2)::

    q . (W_k c) = (W_k^T q) . c        sum_j p_j (W_v c_j) = W_v (sum_j p_j c_j)

so the query goes through the key's half of the projection and the result through the value's, each once a step, and
attention in between is one key/value head of latents for all query heads: grouped attention as every other stage knows
it. Nothing is left out and the result is the same up to rounding, so every plan does it, the identity plan too.

A prompt has as many queries as keys, and expands them for less. It keeps the model's own way, except over a compact
cache that holds fewer rows than the model believes in.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from avl_fx.passes.context import PassContext
from avl_fx.passes.describe import cache_kind
from avl_fx.passes.latents import ExpandedKeys, Expansion, expanded_keys, expansion, is_plain, unchanged
from avl_fx.passes.nodes import fake, op, same_size, shape
from avl_fx.passes.rewrite import insert_call, insert_traced, remove_dead
from avl_fx.passes.share_queries import decoder_sites
from avl_fx.passes.site import PassResult, Site

__all__ = ["absorb_latents"]


def absorb_latents(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Let the decoder's sites of one query attend to latents."""
    result = PassResult("absorb_latents")
    for site in decoder_sites(ctx):
        found = _latents(site)
        if found is None:
            continue
        keys, values = found
        site.latent, site.cache = True, cache_kind(values.latents)
        if site.queries != 1 and not _lacks_rows(keys.nope.latents):
            continue
        _absorb(site, keys, values)
        result.count += 1
    if result.count:
        result.dropped_mutations = tuple(remove_dead(gm.graph, ctx.initially_unused, keep=ctx.keep()))
    return result


def _latents(site: Site) -> tuple[ExpandedKeys, Expansion] | None:
    node = site.node
    if node is None or node.target is not torch.ops.avl.attention.default:
        return None
    query, key, value = node.args[:3]
    keys, values = expanded_keys(key), expansion(value)
    if keys is None or values is None or keys.nope.heads != values.heads:
        return None
    latents, rotated = keys.nope.latents, keys.rotated
    sizes = [shape(n) or () for n in (query, latents, rotated, values.latents)]
    if sizes[0][1] != keys.nope.heads or not all(same_size(s[0], sizes[0][0]) for s in sizes):
        return None
    if not all(is_plain(part.weight) for part in (keys.nope, values)):
        return None
    if fake(node).requires_grad:
        return None
    if len({fake(n).dtype for n in (*node.args[:3], latents, rotated, keys.nope.weight, values.weight)}) != 1:
        return None
    readings = [(latents, keys.nope.product), (rotated, keys.since), (values.latents, values.product)]
    return (keys, values) if unchanged(readings, node) else None


def _lacks_rows(latents: fx.Node) -> bool:
    """Whether they are those of a compact cache that may lack rows."""
    return op(latents) == "append_rows" and (shape(latents.args[0]) or (0, 0, None))[2] != 0


def _absorb(site: Site, keys: ExpandedKeys, values: Expansion) -> None:
    node = site.node
    assert node is not None
    query, _, _, mask, scale, is_causal, index = node.args
    nope = keys.nope
    key_weight = insert_traced(node, _of_heads, nope.weight, nope.heads, nope.width, nope.first, nope.last)
    value_weight = insert_traced(node, _of_heads, values.weight, values.heads, values.width, values.first, values.last)
    absorbed = insert_traced(node, _into_latents, query, key_weight, keys.rotated_first)
    latents, rotated = (_rows(node, part, keys.rows) for part in (nope.latents, keys.rotated))
    same = values.latents is nope.latents and values.rows == keys.rows
    value = latents if same else _rows(node, values.latents, values.rows)
    key = insert_call(node, torch.cat, [latents, rotated], -1)
    latent = insert_call(node, torch.ops.avl.attention.default, absorbed, key, value, mask, scale, is_causal, index)
    out = insert_traced(node, _out_of_latents, latent, value_weight)
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)
    site.node = latent
    site.kv_heads, site.head_dim, site.value_dim = 1, fake(key).shape[3], fake(value).shape[3]


def _rows(before: fx.Node, stored: fx.Node, rows: tuple[slice, ...] | None) -> fx.Node:
    return stored if rows is None else insert_call(before, operator.getitem, stored, rows)


def _of_heads(weight: Tensor, heads: int, width: int, first: int, last: int) -> Tensor:
    """A part of each head of a projection: ``[heads, last - first, rank]``."""
    return weight.unflatten(0, (heads, width))[:, first:last]


def _into_latents(query: Tensor, weight: Tensor, rotated_first: bool) -> Tensor:
    """Queries of keys ``[batch, heads, queries, nope + rope]`` as those of latents ``[.., rank + rope]``."""
    nope = weight.shape[1]
    rope = query.shape[3] - nope
    part = query[..., rope:] if rotated_first else query[..., :nope]
    rotated = query[..., :rope] if rotated_first else query[..., nope:]
    return torch.cat([_by_heads(part, weight), rotated], -1)


def _out_of_latents(out: Tensor, weight: Tensor) -> Tensor:
    """Weighted latents ``[batch, heads, queries, rank]`` as weighted values ``[.., value_dim]``."""
    return _by_heads(out, weight.transpose(1, 2))


def _by_heads(rows: Tensor, weight: Tensor) -> Tensor:
    """Each head's rows ``[batch, heads, queries, n]`` times its ``weight`` ``[heads, n, m]``, which is read once."""
    return torch.einsum("bhqn,hnm->bhqm", rows, weight)
