"""Decode reads the text and the visual keys that matter only (A-VL, arXiv 2409.14846, sections 4.1 to 4.3).

A graph of several queries (a prompt, a later turn) stays dense. For each site it returns one row of scores more: how
much its last queries attended to each key. Between calls the runtime picks core and secondary from it and *reorders the
visual rows of the cache in place* (`avl_fx.partition`), so that core is contiguous.

A graph of one query (a decode step) attends through `avl::partitioned_decode`, which reads only the key ranges that an
additional input names. Which ranges those are (everything, text and core, text and secondary) is data: one graph serves
every step, nothing is compiled anew, and where the state of the cache is unknown the range is everything, which is
exact.

A plan whose lazy layers inherit logits against visual keys (mode ``vla_scores``) needs to know where those keys are,
and nothing else: nothing is scored then, and no row moves.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx

# Importing the operators registers them.
from avl_fx.kernels import visual_scores as _visual_scores  # noqa: F401
from avl_fx.passes.context import CachedTensor, PartitionedLayer, PartitionIO, PassContext
from avl_fx.passes.drop_keys import output_positions
from avl_fx.passes.latents import latents_of
from avl_fx.passes.nodes import alias_root, arg, fake, mutated_input, op, same_shape, shape, writes_to
from avl_fx.passes.read_ranges import read_ranges, take_ranges, takes
from avl_fx.passes.rewrite import insert_call, remove_dead
from avl_fx.passes.sharded_heads import process_group
from avl_fx.passes.share_queries import decoder_sites, same_value
from avl_fx.passes.site import PassResult, Reason, Site, Status
from avl_fx.plan import Plan

__all__ = ["partition_modalities", "static_positions"]

_QUERY, _KEY, _VALUE, _MASK, _SCALE, _CAUSAL = range(6)
_PRODUCTS = frozenset({"linear", "addmm", "matmul", "bmm", "einsum", "topk"})
_SAME_TENSOR = frozenset({"detach", "alias"})


def partition_modalities(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Apply ``ctx.plan``'s sections ``vision`` and ``text`` to the decoder's sites; keep track of visual keys."""
    result = PassResult("partition_modalities")
    if not ctx.tracks_visual:
        return result
    window = 1 if ctx.plan.vision_policy is None else ctx.plan.vision_policy.scoring_window
    layers: list[tuple[Site, PartitionedLayer]] = []
    by_key: dict[fx.Node, Site] = {}
    calls = Counter(site.layer for site in decoder_sites(ctx) if site.kind == "full")
    for site in decoder_sites(ctx):
        if site.node is None or site.status is Status.REFUSED:
            continue
        if site.kind == "full" and calls[site.layer] > 1:
            # The state of a cache goes by layers, and scores of one call say nothing of another.
            _refuse(result, ctx, site, Reason.LAYER_UNKNOWN, f"{calls[site.layer]} calls share its number")
            continue
        # The layers of a compact cache have one layout.
        if not (ctx.plan.reads_less or _in_block(site) or (ctx.compact is not None and site.kind == "full")):
            continue
        outcome = _understand(gm, ctx, site, by_key, layers)
        if not isinstance(outcome, PartitionedLayer) and outcome[0] is Reason.NO_CACHE:
            if not (ctx.plan.spares_visual_keys and _in_block(site)):  # prompts inherit without a cache, too
                _refuse(result, ctx, site, *outcome)
            continue
        if isinstance(outcome, PartitionedLayer):
            layers.append((site, outcome))
            by_key.setdefault(_rows(site)[0], site)
        else:
            _refuse(result, ctx, site, *outcome)
    if not layers:
        return result
    # A prompt may be a single token: it continues no cache.
    continues = all(layer.value is None or layer.value.before is not None for _, layer in layers)
    decode = layers[0][0].queries == 1 and continues
    io = PartitionIO(decode=decode, layers=[layer for _, layer in layers], compact=ctx.compact is not None)
    first = layers[0][0].node
    assert first is not None
    io.process_group = process_group(layers[0][0])
    io.weight = _weight(gm, _rows(layers[0][0])[1])
    # A decode step asks the same as a prompt: the partition may start there.
    io.positions = static_positions(layers[0][0])
    if first.args[_MASK] is not None:
        io.last_mask = insert_call(first, operator.getitem, first.args[_MASK], (slice(None), slice(None), -1))
    if decode:
        result.new_inputs = take_ranges(gm, ctx, layers[0][0])
    words = f"partitioned: {_in_words(ctx.plan)}" if decode else "then partitioned"
    for site, layer in layers:
        layer.scored = layer.decides and ctx.plan.reads_less
        if decode:
            weights = read_ranges(site, ctx)
            layer.weights = weights if layer.scored else None
        elif layer.scored:
            layer.weights = _score(site, io, window)
        site.status = Status.REWRITTEN
        if ctx.plan.reads_less:
            site.action = words if decode and site.action == "dense" else f"{site.action}, {words}"
        result.count += 1
    ctx.partition = io
    remove_dead(gm.graph, ctx.initially_unused, keep=ctx.keep())
    return result


def _refuse(result: PassResult, ctx: PassContext, site: Site, reason: Reason, detail: str) -> None:
    if ctx.plan.inherits_scores:
        site.action = "dense"  # nothing is inherited where it is not known which keys are visual
    result.refuse(site, reason, detail)


def _in_words(plan: Plan) -> str:
    """What a decode step reads: ``core 0.3, secondary 0.5 every 3 steps, text 0.6``, shares of what there is."""
    vision, text = plan.vision_policy, plan.text_window
    parts = []
    if vision is not None and not vision.is_identity:
        if vision.refresh > 1:
            parts.append(f"core {vision.core:g}")
        every = f" every {vision.refresh} steps" if vision.refresh > 1 else ""
        parts.append(f"secondary {vision.secondary:g}{every}{vision.departures('scores', 'spread')}")
    if text is not None:
        parts.append(f"text {text.budget:g}")
    return ", ".join(parts)


def _rows(site: Site) -> tuple[fx.Node, fx.Node]:
    """What a cache layer holds of ``site``: keys and values, or latents and rotated keys."""
    assert site.node is not None
    return latents_of(site) or (site.node.args[_KEY], site.node.args[_VALUE])  # type: ignore[return-value]


def _in_block(site: Site) -> bool:
    return site.anchor is not None or site.action == "anchor"


def _understand(
    gm: fx.GraphModule,
    ctx: PassContext,
    site: Site,
    by_key: dict[fx.Node, Site],
    layers: list[tuple[Site, PartitionedLayer]],
) -> PartitionedLayer | tuple[Reason, str]:
    """Where the runtime finds keys and values of ``site`` before and after a call; or why it is not partitioned.

    Whether the prompt sees all visual keys is asked of the first of ``layers`` alone, so all have to share its mask.
    """
    first = layers[0][0] if layers else site
    assert site.node is not None
    assert first.node is not None
    if site.kind != "full":
        return Reason.POSITION_MASK, site.kind
    if site.cache == "none":
        return Reason.NO_CACHE, ""
    if site.cache == "other":
        return Reason.NOT_THE_CACHE, "keys are made from what it stores"
    if site.layer is None:
        return Reason.LAYER_UNKNOWN, ""
    if site.latent and _in_block(site):
        return Reason.NOT_THE_CACHE, "latents in a lazy block"
    mask = site.node.args[_MASK]
    key, value = _rows(site)
    anchor = by_key.get(key)
    shares = site.anchor is None and anchor is not None and _rows(anchor)[1] is value
    same_mask = same_value(mask, first.node.args[_MASK]) and (mask is None or len(shape(mask) or ()) == 4)
    if not same_mask and (first.queries == 1 or not shares):  # a layer that shares rows scores nothing in a prompt
        return Reason.POSITION_MASK, "another mask than the first layer's"
    if process_group(site) != process_group(first):
        return Reason.OTHER_PROCESSES, ""
    if _is_learned(mask):  # type: ignore[arg-type]
        return Reason.POSITION_MASK, "it is computed from hidden states"
    if shares:  # another layer's rows, which lie in the order that it decides; nothing is scored
        owner = next(layer for other, layer in layers if other is anchor)
        return PartitionedLayer(site.layer, owner.scores_from, None, None)
    stored_value = _stored(gm, ctx, value)
    stored_key = None if anchor is not None else _stored(gm, ctx, key)
    if stored_value is None or (stored_key is None and anchor is None):
        return Reason.NOT_THE_CACHE, "keys" if stored_value is not None else "values"
    scores_from = site.layer if anchor is None else anchor.layer
    if site.anchor is not None:
        # Lazy layers with keys of their own follow their anchor, too: its logits are of the rows as they lie there.
        if site.anchor not in (layer.layer for _, layer in layers):
            return Reason.ANCHOR_REFUSED, ""
        scores_from = site.anchor
    assert scores_from is not None
    keyless = site.anchor is not None and stored_key is not None and takes(fake(site.node.args[_QUERY]))
    return PartitionedLayer(site.layer, scores_from, stored_key, stored_value, keyless=keyless)


def _is_learned(mask: fx.Node | None, limit: int = 400) -> bool:
    """Whether ``mask`` is computed from hidden states: which keys it shows then goes by where they lie."""
    pending = [] if mask is None else [mask]
    seen = set(pending)
    while pending and len(seen) < limit:
        node = pending.pop()
        if op(node) in _PRODUCTS:
            return True
        upper = [n for n in node.all_input_nodes if n not in seen]
        seen.update(upper)
        pending += upper
    return False


def _stored(gm: fx.GraphModule, ctx: PassContext, tensor: Any) -> CachedTensor | None:
    """Where ``tensor`` is kept between calls; ``None`` unless it is a cache tensor as it stands, or its first rows."""
    node = tensor
    while isinstance(node, fx.Node):
        target = mutated_input(node)
        if target is not None:
            node = target
        elif op(node) in _SAME_TENSOR or _is_prefix(node):
            node = node.args[0]
        else:
            break
    if not isinstance(node, fx.Node):
        return None
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if node.op == "placeholder":
        return CachedTensor(before=placeholders.index(node)) if writes_to(node) else None
    output = next(n for n in gm.graph.nodes if n.op == "output")
    root, returned = alias_root(node), output.args[0]
    positions = output_positions(returned, root)
    if len(positions) != 1 or not same_shape(returned[positions[0]], node):
        return None
    before = None
    if op(root) == "cat" and isinstance(root.args[0], tuple | list) and len(root.args[0]) == 2:
        past = alias_root(root.args[0][0])  # type: ignore[arg-type]
        past = past if ctx.compact is None else ctx.compact.spread.get(past, past)
        before = placeholders.index(past) if past.op == "placeholder" else None
    return CachedTensor(before=before, after=positions[0])


def _is_prefix(node: fx.Node) -> bool:
    """Whether ``node`` is ``cache[:, :, :n]``: key positions are those of the cache."""
    if op(node) != "getitem" or not isinstance(node.args[1], tuple):
        return False
    parts = node.args[1]
    if len(parts) > 4 or not all(isinstance(p, slice) and p.start in (None, 0) and p.step in (None, 1) for p in parts):
        return False
    return all(p.stop is None for i, p in enumerate(parts) if i != 2)


def static_positions(site: Site) -> fx.Node | None:
    """The key positions ``[queries]`` that a static cache writes this graph's keys to."""
    for write in writes_to(alias_root(_rows(site)[0])):
        if op(write) == "index_copy_":
            return write.args[2]  # type: ignore[return-value]
    return None


def _weight(gm: fx.GraphModule, value: Any, limit: int = 16) -> int | None:
    """Which input is the weight of the projection that makes ``value``, if it is one."""
    pending = [alias_root(value)]
    for node in itertools.islice(pending, limit):
        if op(node) == "linear":
            inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
            weight = arg(node, 1, "weight")
            return inputs.index(weight) if weight in inputs else None
        # The rows of this forward are what is appended last, or what is written into a buffer.
        sources = [n for write in writes_to(node) for n in write.all_input_nodes] or node.all_input_nodes[::-1]
        pending += [alias_root(n) for n in sources if isinstance(fake(n), torch.Tensor)]
    return None


def _score(site: Site, io: PartitionIO, window: int) -> fx.Node:
    node = site.node
    assert node is not None
    query, key, _, mask, scale, is_causal, _ = node.args
    scores = insert_call(
        node, torch.ops.avl.visual_scores.default, query, key, mask, io.positions, scale, is_causal, window
    )
    if site.latent and (shape(scores) or ())[1] != 1:  # the heads share what is stored
        return insert_call(node, "mean", scores, 1, keepdim=True)
    return scores
