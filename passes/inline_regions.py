"""What a model checkpoints (`torch.utils.checkpoint`, gradient checkpointing) is a part of its graph like any other.

Dynamo puts each checkpointed region into a graph of its own behind one node, in which no other stage would look: a plan
would do nothing to a model that is trained so. AOTAutograd takes them apart in any case, and tells its partitioner by a
mark on each node what is to be computed again for the gradient. Here that is done before: the same nodes, the same
marks.

Other regions are left as they are, and attention in them is refused by name: checkpointed ones whose own policy says
what is kept; branches (`torch.cond`); what is compiled once and called for each layer (`nested_compile_region`), where
no node tells which layer it is of; functions with a gradient of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from avl_fx.passes.context import PassContext
from avl_fx.passes.describe import describe_site
from avl_fx.passes.library_kernels import library_attention
from avl_fx.passes.nodes import mutations, op
from avl_fx.passes.site import PassResult, Reason, Site
from avl_fx.passes.softmax_pattern import NotAttention, Refusal, match_softmax

__all__ = ["inline_regions"]

_CHECKPOINT = "tag_activation_checkpoint"
_SELECTIVE = "_checkpoint_context_fn"
"""What the body of a region with a policy of its own is marked with."""


def inline_regions(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Put the nodes of every checkpointed region of ``gm`` in its place, and refuse attention in any other region."""
    result = PassResult("inline_regions")
    inlined: set[fx.Node] = set()
    pending = [n for n in gm.graph.nodes if _bodies(gm, n)]
    while pending:
        region = pending.pop(0)
        bodies = _bodies(gm, region)
        if op(region) == _CHECKPOINT and _SELECTIVE not in bodies[0].meta:
            result.count += 1
            made = _inline(gm, region, bodies[0], result.count)
            inlined.update(made)
            pending[:0] = [n for n in made if _bodies(gm, n)]
        else:
            _refuse(region, bodies, ctx, result)
    inlined.intersection_update(gm.graph.nodes)  # without regions that stood in others
    # Dynamo keeps a node without users for its effects, here as elsewhere.
    ctx.initially_unused |= {node for node in inlined if not node.users}
    result.added_mutations = tuple(node.name for node in mutations(gm.graph.nodes) if node in inlined)
    return result


def _bodies(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graphs behind ``node``, if it is a region."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    sources = [n for n in node.all_input_nodes if n.op == "get_attr"]
    found = [getattr(gm, str(n.target), None) for n in sources]
    return [body for body in found if isinstance(body, fx.GraphModule)]


def _inline(gm: fx.GraphModule, region: fx.Node, body: fx.GraphModule, number: int) -> list[fx.Node]:
    """``number`` tells regions apart, ascending: what one hands to a later one is kept."""
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    found: dict[fx.Node, Any] = dict(zip(inputs, region.args[1:], strict=True))
    made = []
    with gm.graph.inserting_before(region):
        for node in body.graph.nodes:
            if node in found:
                continue
            if node.op == "output":
                _hand_over(region, fx.node.map_arg(node.args[0], found.__getitem__))
                break
            new = gm.graph.node_copy(node, found.__getitem__)
            if node.op == "get_attr":
                new.target = _adopt(gm, body, str(node.target))
            else:
                new.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": number}
            found[node] = new
            made.append(new)
    source: Any = region.args[0]
    gm.graph.erase_node(region)
    if not source.users:
        gm.graph.erase_node(source)
    return made


def _hand_over(region: fx.Node, outputs: Any) -> None:
    """Let what the body returns stand for what is taken from the region: one of several, or the only one itself."""
    for user in list(region.users):
        if op(user) == "getitem" and isinstance(outputs, tuple | list):
            place: Any = user.args[1]
            user.replace_all_uses_with(outputs[place])
            region.graph.erase_node(user)
    if region.users:
        region.replace_all_uses_with(outputs)


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, target: str) -> str:
    """An attribute of ``body`` (the body of an inner region, a constant) as one of ``gm``; returns its name there."""
    value: Any = body
    for part in target.split("."):
        value = getattr(value, part)
    number = 0
    while hasattr(gm, name := f"inlined_{target.replace('.', '_')}_{number}"):
        number += 1
    setattr(gm, name, value)
    return name


def _refuse(region: fx.Node, bodies: list[fx.GraphModule], ctx: PassContext, result: PassResult) -> None:
    inside = [part for body in bodies for part in body.modules() if isinstance(part, fx.GraphModule)]
    for node in (node for part in inside for node in part.graph.nodes if _attends(node)):
        site = Site(index=len(ctx.sites), style="region", node=region)
        ctx.sites.append(site)
        describe_site(site, node, None, None, None, ctx)
        result.refuse(site, Reason.REGION, "checkpoint" if op(region) == _CHECKPOINT else op(region))


def _attends(node: fx.Node) -> bool:
    if op(node) in ("scaled_dot_product_attention", "flex_attention"):
        return True
    if op(node) != "softmax":
        return library_attention(node) is not None
    try:
        match_softmax(node)
    except NotAttention:
        return False
    except Refusal:
        pass
    return True
