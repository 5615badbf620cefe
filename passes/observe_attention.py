"""While somebody calibrates, a prompt returns what its last query attends to, layer by layer.

Layers whose last rows are alike may share queries and keys (Q Cache, arXiv 2602.01901, section 3), and how the visual
part of a row is spread says how many visual keys matter (A-VL, arXiv 2409.14846, section 3). The rows are made beside
the attention that the model runs, from the same query, key, mask and scale; nothing else in the graph changes. It comes
before every stage that changes sites, and does nothing outside of `avl_fx.calibrate`.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

# Importing the operator registers it.
from avl_fx.kernels import last_rows as _last_rows  # noqa: F401
from avl_fx.passes.context import ObservedAttention, ObservedLayer, PassContext
from avl_fx.passes.latents import latents_of
from avl_fx.passes.nodes import METADATA_OPS, alias_root, op, shape, writes_to
from avl_fx.passes.partition_modalities import static_positions
from avl_fx.passes.rewrite import insert_call
from avl_fx.passes.sharded_heads import process_group
from avl_fx.passes.share_queries import decoder_sites, why_not
from avl_fx.passes.site import PassResult, Reason, Site, Status

__all__ = ["observe_attention"]

_QUERY, _KEY, _VALUE, _MASK, _SCALE, _CAUSAL = range(6)


def observe_attention(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Let every self-attention site of a prompt's decoder return its last row, where ``ctx.observe`` asks for it."""
    result = PassResult("observe_attention")
    # A graph of one query is a decode step.
    sites = [site for site in decoder_sites(ctx) if site.queries != 1] if ctx.observe else []
    if not sites:
        return result
    chosen, excluded = _choose(sites)
    counted = next((s for s in chosen if s.kind == "full"), chosen[0] if chosen else None)
    depths = {site.depth for site in sites if site.depth is not None}
    observed = ObservedAttention(
        layers=[],
        excluded=excluded,
        apart=_apart(chosen),
        depth=ctx.expected_layers or (depths.pop() if len(depths) == 1 else None),
        cross=any(site.kind == "cross" for site in sites),
        positions=None if counted is None else static_positions(counted),
        process_group=None if counted is None else process_group(counted),
    )
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    for site in chosen:
        assert site.node is not None
        assert site.layer is not None
        assert counted is not None
        assert counted.node is not None
        query, key, _, mask, scale, is_causal, _ = site.node.args
        shared = (counted.node.args[_MASK], observed.positions)
        # Beside its site, so that no query is kept longer; but not before the mask that counts is there.
        there = all(order[node] < order[site.node] for node in shared if isinstance(node, fx.Node))
        rows = insert_call(
            site.node if there else counted.node,
            torch.ops.avl.last_rows.default,
            query,
            key,
            mask,
            *shared,
            scale,
            is_causal,
        )
        sizes = (site.heads, site.kv_heads, site.head_dim, site.value_dim)
        latents = latents_of(site)
        if latents is not None:  # of which a lazy layer still makes its values
            sizes = (site.heads, 1, 0, sum((shape(n) or (0,))[-1] for n in latents))
        linears = _own_linears(site, rows)
        observed.layers.append(ObservedLayer(site.layer, site.kind, *sizes, site.dtype, linears, rows))
        result.count += 1
    ctx.observed = observed
    return result


def _choose(sites: list[Site]) -> tuple[list[Site], dict[int, str]]:
    """The sites that are observed, by layer; and why each other layer is not."""
    times = Counter(site.layer for site in sites)
    chosen: list[Site] = []
    excluded: dict[int, str] = {}
    for site in sorted((s for s in sites if s.layer is not None), key=lambda s: s.layer or 0):
        assert site.layer is not None
        if site.kind == "cross":
            excluded.setdefault(site.layer, "cross-attention")
        elif times[site.layer] > 1:
            excluded[site.layer] = f"attends {times[site.layer]} times"
        elif site.status is Status.REFUSED or site.node is None:
            excluded[site.layer] = ": ".join(filter(None, (str(site.reason), site.detail)))
        else:
            chosen.append(site)
    return chosen, excluded


def _apart(sites: list[Site]) -> dict[tuple[int, int], str]:
    """Pairs of layers that no block may hold, with the reason that `share_queries` would give."""
    found: dict[tuple[int, int], str] = {}
    for number, site in enumerate(sites):
        for anchor in sites[:number]:
            refusal: tuple[Reason, str] | None = why_not(site, anchor)
            if refusal is not None:
                assert anchor.layer is not None
                assert site.layer is not None
                found[anchor.layer, site.layer] = ": ".join(filter(None, map(str, refusal)))
    return found


def _own_linears(site: Site, rows: fx.Node) -> int:
    """Linear layers above the query and key of ``site`` that nothing else uses; that keys are stored does not count."""
    assert site.node is not None
    query, key, *_ = site.node.args
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    stored = alias_root(key)
    own = {site.node, rows}
    pending = [query, key, *writes_to(stored)]
    found = 0
    while pending:
        node = pending.pop()
        if node in own or node.op == "placeholder":
            continue
        if not all(user in own or _is_for_storage(user, node, stored) for user in node.users):
            continue
        own.add(node)
        found += op(node) == "linear"
        pending += node.all_input_nodes
    return found


def _is_for_storage(user: fx.Node, node: fx.Node, stored: fx.Node) -> bool:
    """Whether ``user`` does nothing with ``node`` but ask for its shape, or return the keys to a cache, or a part."""
    if op(user) in METADATA_OPS:
        return True
    if user.op == "output":
        return alias_root(node) is stored
    return alias_root(user) is stored and all(_is_for_storage(u, user, stored) for u in user.users)
