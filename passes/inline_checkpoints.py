"""What a model checkpoints (`torch.utils.checkpoint`, gradient checkpointing) is a part of its graph like any other.

Dynamo puts each checkpointed region into a graph of its own behind one node, in which no other stage would look: a plan
would do nothing to a model that is trained so. AOTAutograd takes them apart in any case, and tells its partitioner by a
mark on each node what is to be computed again for the gradient. Here that is done before: the same nodes, the same
marks. Regions whose own policy says what is kept (selective checkpointing) are left as they are.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from avl_fx.passes.context import PassContext
from avl_fx.passes.describe import describe_site
from avl_fx.passes.nodes import mutations, op
from avl_fx.passes.site import PassResult, Reason, Site

__all__ = ["inline_checkpoints"]

_ATTENDING = ("scaled_dot_product_attention", "softmax", "flex_attention")
_SELECTIVE = "_checkpoint_context_fn"
"""What the body of a region with a policy of its own is marked with."""


def inline_checkpoints(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Put the nodes of every checkpointed region of ``gm`` in its place."""
    result = PassResult("inline_checkpoints")
    inlined: dict[fx.Node, None] = {}
    refused: set[fx.Node] = set()
    while (region := next((n for n in gm.graph.nodes if _is_region(n) and n not in refused), None)) is not None:
        body = gm.get_submodule(region.args[0].target)
        if isinstance(body, fx.GraphModule) and _SELECTIVE not in body.meta:
            result.count += 1
            inlined.update(dict.fromkeys(_inline(gm, region, body, result.count)))
        else:
            refused.add(region)
            _refuse(region, body, ctx, result)
    # Dynamo keeps a node without users for its effects, here as elsewhere.
    ctx.initially_unused |= {node for node in inlined if not node.users}
    result.added_mutations = tuple(node.name for node in mutations(gm.graph.nodes) if node in inlined)
    return result


def _is_region(node: fx.Node) -> bool:
    return op(node) == "tag_activation_checkpoint" and isinstance(node.args[0], fx.Node)


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


def _refuse(region: fx.Node, body: Any, ctx: PassContext, result: PassResult) -> None:
    nodes = body.graph.nodes if isinstance(body, fx.GraphModule) else ()
    for node in nodes:
        if op(node) in _ATTENDING:
            site = Site(index=len(ctx.sites), style="checkpoint", node=region)
            ctx.sites.append(site)
            describe_site(site, node, None, None, None, ctx)
            result.refuse(site, Reason.CHECKPOINT)
