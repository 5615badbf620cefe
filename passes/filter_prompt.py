"""The prefill filter: behind one layer a prompt runs on the visual tokens that matter (A-VL, arXiv 2409.14846, 4.2).

Behind decoder layer r the visual tokens that the end of the prompt attends to least are dropped, and every later layer
runs on the rest, at their original positions. Where the hidden state passes from layer r to the next one, the graph is
cut: what follows runs on fewer rows (`fewer_rows`), and keys, values and scores that come out are put back among all
positions. Dropped tokens have no keys there, so the filter is for caches that do not store them: an `AVLCache`, whose
secondary set is chosen among the survivors. Everywhere else the prompt stays whole, and the reason is named.

How many tokens are dropped is data: one graph serves every prompt.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings

# Importing the operator registers it.
from avl_fx.kernels import survivors as _survivors  # noqa: F401
from avl_fx.passes.context import PassContext, PromptFilter
from avl_fx.passes.fewer_rows import CannotShorten, FewerRows, tail_of
from avl_fx.passes.nodes import fake, op, shape
from avl_fx.passes.rewrite import add_input, insert_call, insert_traced
from avl_fx.passes.sharded_heads import summed_over
from avl_fx.passes.share_queries import decoder_sites
from avl_fx.passes.site import PassResult, Reason, Site
from avl_fx.passes.visual_inputs import new_flags

__all__ = ["filter_prompt"]

_MASKS = {"attention": (3, 5), "visual_scores": (2, 5)}
"""Operator -> positions of its arguments ``mask`` and ``is_causal``."""
LEAST = -1.0
"""The score of a token that was dropped: below every other."""


def filter_prompt(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Apply ``ctx.plan``'s section ``prefill`` to a prompt's graph."""
    result = PassResult("filter_prompt")
    policy, io = ctx.plan.prefill_policy, ctx.partition
    if policy is None or not ctx.plan.filters_prompts or io is None or io.decode:
        return result
    behind = [s for s in decoder_sites(ctx) if s.layer is not None and s.layer > policy.after_layer]
    refusal = _why_not(ctx, behind)
    if refusal is None:
        refusal = _filter(gm, ctx, result)
    if refusal is not None:
        reason, detail = refusal
        result.refused[str(reason)] += len(behind)
        for site in behind:
            site.action += f"; all tokens: {reason}" + (f" ({detail})" if detail else "")
        return result
    for site in behind:
        site.action += f", on {policy.keep:g} of the visual tokens"
        result.count += 1
    return result


def _why_not(ctx: PassContext, behind: list[Site]) -> tuple[Reason, str] | None:
    io = ctx.partition
    assert io is not None
    if ctx.compact is None:
        return Reason.FILTER_CACHE, ""
    if any(tensor.before is not None for layer in io.layers for tensor in layer.cached):
        return Reason.FILTER_LATER, ""
    if ctx.visual is None:
        return Reason.VISUAL_UNKNOWN, ""
    decided_by = {layer.layer: layer.scores_from for layer in io.layers}
    policy = ctx.plan.prefill_policy
    assert policy is not None
    if policy.after_layer not in decided_by or not behind:
        return Reason.FILTER_LAYERS, f"layer {policy.after_layer} is not among those of the graph that are partitioned"
    for site in behind:
        if decided_by.get(site.layer, -1) <= policy.after_layer:  # type: ignore[arg-type]
            return Reason.FILTER_LAYERS, f"layer {site.layer}"
    if ctx.without_attention:
        return Reason.FILTER_LAYERS, f"layer {min(ctx.without_attention)} mixes tokens without attention"
    return None


def _filter(gm: fx.GraphModule, ctx: PassContext, result: PassResult) -> tuple[Reason, str] | None:
    policy, io = ctx.plan.prefill_policy, ctx.partition
    assert policy is not None
    assert io is not None
    sites = {s.layer: s for s in decoder_sites(ctx) if s.node is not None}
    cut = _stream(sites[policy.after_layer], sites[policy.after_layer + 1])
    if cut is None:
        return Reason.FILTER_STREAM, ""
    sizes = shape(cut) or ()
    if len(sizes) != 3:
        return Reason.FILTER_STREAM, f"{cut.name} has {len(sizes)} dimensions"
    if isinstance(sizes[1], int):
        return Reason.FILTER_LENGTH, "avl_fx.compile, or torch.compile(dynamic=True), leaves it open"
    if not sizes[1].node.shape_env.allow_dynamic_output_shape_ops:
        return Reason.FILTER_SIZES, "avl_fx.compile, or torch._dynamo.config.capture_dynamic_output_shape_ops, lets it"
    layers = {layer.layer: layer for layer in io.layers}
    scores = layers[layers[policy.after_layer].scores_from].weights
    flags, result.new_inputs = new_flags(gm, ctx)
    if flags is None or scores is None:
        return Reason.VISUAL_UNKNOWN, ""
    may_drop = add_input(gm.graph, "avl_may_drop", (1,), torch.int32, scores)
    # Each process has to drop the same tokens: hidden states are added up over all of them.
    before = cut.next
    summed = [] if io.process_group is None else summed_over(io.process_group, before, scores)
    scores = summed[-1] if summed else scores
    chosen = _choose(before, scores, flags, io.last_mask, may_drop, policy.keep, tail_of(cut))
    rows, valid = (insert_call(chosen.next, operator.getitem, chosen, i) for i in (0, 1))
    shortened = None
    try:
        shortened = FewerRows(cut, rows)
        _check_outputs(gm, ctx, shortened)
    except CannotShorten as error:
        if shortened is not None:
            shortened.roll_back()
        for node in (valid, rows, chosen, may_drop, *reversed(summed)):
            gm.graph.erase_node(node)
        return Reason.FILTER_GRAPH, str(error)
    result.new_inputs = (*result.new_inputs, may_drop.name)
    shortened.commit()
    if not shortened.alone:
        _hide_fillers(shortened, valid)
    _put_back(gm, ctx, shortened, valid)
    ctx.prompt_filter = PromptFilter(policy.keep, shortened.left)
    io.left = valid
    return None


def _stream(site: Site, following: Site) -> fx.Node | None:
    """The hidden state that alone leads from the attention of ``site`` to that of ``following`` and all later ones."""
    first, last = site.node, following.node
    assert first is not None
    assert last is not None
    at = {node: position for position, node in enumerate(first.graph.nodes)}
    depends, found = {first}, None
    furthest = max((at[user] for user in first.users), default=-1)
    node = first.next
    while node is not last and node.op != "root":
        if not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            # No earlier node that depends on the attention is read behind this one.
            if furthest <= at[node] and isinstance(fake(node), torch.Tensor):
                found = node
            furthest = max((furthest, *(at[user] for user in node.users)))
        node = node.next
    return found if node is last else None


def _choose(before: fx.Node, *arguments: Any) -> fx.Node:
    """Insert `avl::survivors`, with the size that it makes known to the shape environment."""
    chosen = insert_call(before, torch.ops.avl.survivors.default, *arguments)
    values = fake(chosen)
    compute_unbacked_bindings(values[0].fake_mode.shape_env, values)
    return chosen


def _caches(ctx: PassContext) -> set[int]:
    """Positions of the outputs that are keys and values of partitioned layers."""
    assert ctx.partition is not None
    stored = (tensor for layer in ctx.partition.layers for tensor in layer.cached)
    return {tensor.after for tensor in stored if tensor.after is not None}


def _leaving(gm: fx.GraphModule, ctx: PassContext, shortened: FewerRows) -> Iterator[tuple[int, fx.Node]]:
    """What runs on fewer positions and is returned, and at which position of the outputs."""
    emptied = ctx.emptied()
    for position, node in enumerate(_outputs(gm).args[0]):  # type: ignore[arg-type]
        if shortened.depends(node) and position not in emptied:
            yield position, node


def _check_outputs(gm: fx.GraphModule, ctx: PassContext, shortened: FewerRows) -> None:
    """Everything that comes out can be put back among all positions.

    Raises:
        CannotShorten: something cannot.
    """
    caches = _caches(ctx)
    for position, node in _leaving(gm, ctx, shortened):
        value = fake(node)
        if not isinstance(value, torch.Tensor):
            raise CannotShorten(f"{node.name}, no tensor, is returned")
        dims = shortened.dims_of(node)
        if dims and (len(dims) > 1 or not value.is_floating_point()):
            raise CannotShorten(f"{node.name} is returned, of {tuple(value.shape)} in {value.dtype}")
        if dims and value.dim() > 3 and position not in caches:
            raise CannotShorten(f"{node.name} is returned, which may be a cache")
    assert ctx.partition is not None
    for layer in ctx.partition.layers:
        if layer.weights is not None and shortened.depends(layer.weights):
            shortened.dims_of(layer.weights)


def _hide_fillers(shortened: FewerRows, valid: fx.Node) -> None:
    """Batch rows that lose more than another are filled up: nobody sees these tokens but they themselves."""
    masks: dict[tuple[Any, bool], fx.Node] = {}
    for node in shortened.nodes:
        if op(node) not in _MASKS:
            continue
        at_mask, at_causal = _MASKS[op(node)]
        key = node.args[at_mask], bool(node.args[at_causal])
        if key not in masks:
            mask, is_causal = key
            if mask is None:
                masks[key] = insert_traced(node, _causal if is_causal else _shown, valid)
            else:
                masks[key] = insert_traced(node, _with_fillers_hidden, mask, valid)
        arguments = list(node.args)
        arguments[at_mask], arguments[at_causal] = masks[key], False
        node.args = tuple(arguments)


def _put_back(gm: fx.GraphModule, ctx: PassContext, shortened: FewerRows, valid: fx.Node) -> None:
    """What leaves the graph has a row for every position.

    Dropped tokens have no keys: those rows are zeros, and nobody stores them. Hidden states and logits of theirs are
    NaN, so that who reads them all the same notices. Their scores are below every other.
    """
    output, caches = _outputs(gm), _caches(ctx)
    returned = list(output.args[0])  # type: ignore[arg-type]
    for position, node in _leaving(gm, ctx, shortened):
        if shortened.dims_of(node):
            fill = 0.0 if position in caches else float("nan")
            returned[position] = shortened.put_back(node, output, fill)
    output.args = (tuple(returned),)
    assert ctx.partition is not None
    for layer in ctx.partition.layers:
        if layer.weights is None or not shortened.depends(layer.weights):
            continue
        weights = layer.weights
        if not shortened.alone:
            weights = insert_traced(output, _without_fillers, weights, valid)
        layer.weights = shortened.put_back(weights, output, LEAST)


def _outputs(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "output")


def _positions(valid: Tensor) -> Tensor:
    """1, 2, ... int64 ``[left]``"""
    return torch.cumsum(torch.ones_like(valid[0], dtype=torch.int64), 0)


def _shown(valid: Tensor) -> Tensor:
    """bool ``[batch, 1, left, left]``: valid tokens, and each token itself."""
    position = _positions(valid)
    itself = torch.eq(position[:, None], position[None])
    return torch.logical_or(valid[:, None, None], itself)


def _causal(valid: Tensor) -> Tensor:
    position = _positions(valid)
    return torch.logical_and(_shown(valid), torch.ge(position[:, None], position[None]))


def _with_fillers_hidden(mask: Tensor, valid: Tensor) -> Tensor:
    shown = _shown(valid)
    if mask.dtype == torch.bool:
        return torch.logical_and(mask, shown)
    return torch.masked_fill(mask, torch.logical_not(shown), torch.finfo(mask.dtype).min)


def _without_fillers(weights: Tensor, valid: Tensor) -> Tensor:
    return torch.masked_fill(weights, torch.logical_not(valid)[:, None], LEAST)
