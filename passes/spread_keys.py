"""A prompt over a compact cache sees every key of a lazy layer again.

In the modes ``vla`` and ``vla_scores`` a lazy layer takes keys or logits from its anchor at visual positions, so an
`AVLCache` stores no keys of its own there (`avl_fx.cache`): they have fewer rows than its values. A decode step reads
them as they are (`inherit_scores`). For a prompt, whose mask has a column for every row, they are spread out: between
them stand the anchor's keys (``vla``), or zeros, whose logits the anchor's replace (``vla_scores``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import alias_root, op, shape
from avl_fx.passes.rewrite import add_input, insert_call, insert_traced
from avl_fx.passes.share_queries import lazy_blocks
from avl_fx.passes.site import PassResult

__all__ = ["spread_keys"]

_KEY, _VALUE = 1, 2


def spread_keys(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Spread the stored keys of lazy sites that ask for several queries."""
    result = PassResult("spread_keys")
    policy = ctx.plan.lazy_policy
    if ctx.compact is None or policy is None or not ctx.plan.spares_visual_keys:
        return result
    inputs = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    for anchor, lazy in lazy_blocks(ctx):
        theirs = _stored(anchor.node, _KEY)
        for site in lazy:
            own, values = _stored(site.node, _KEY), _stored(site.node, _VALUE)
            if site.queries == 1 or own is None or values is None or theirs is None:
                continue
            assert site.node is not None
            if ctx.compact.key_rows is None:
                batch, _, rows, _ = shape(values) or ()
                ctx.compact.key_rows = add_input(gm.graph, "avl_key_rows", (batch, rows), torch.int64, values)
                result.new_inputs = (ctx.compact.key_rows.name,)
            grown = alias_root(site.node.args[_KEY])  # type: ignore[arg-type]
            between = theirs if policy.mode == "vla" else None
            spread = insert_traced(grown, _spread, ctx.compact.key_rows, own, between)
            whole = insert_call(grown, torch.cat, [spread, grown.args[0][1]], 2)  # type: ignore[index]
            grown.replace_all_uses_with(whole)
            gm.graph.erase_node(grown)
            ctx.compact.spread[spread] = own
            ctx.compact.short[inputs[own]] = site
            result.count += 1
    return result


def _stored(attention: fx.Node | None, place: int) -> fx.Node | None:
    """The input with the rows that an attention's keys or values grow from; ``None``: there are none yet."""
    root = None if attention is None else alias_root(attention.args[place])  # type: ignore[arg-type]
    if root is None or op(root) != "cat":
        return None
    past: Any = root.args[0][0]  # type: ignore[index]
    return past if past.op == "placeholder" and (shape(past) or (0, 0, 0))[2] != 0 else None


def _spread(rows: Tensor, own: Tensor, between: Tensor | None) -> Tensor:
    """Keys ``own`` ``[batch, kv_heads, fewer, head_dim]`` at ``rows`` int64 ``[batch, keys]``; ``between`` where -1."""
    missing = torch.lt(rows, 0)[:, None, :, None]
    index = rows.clamp(min=0)[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3])
    found = own.gather(2, index)
    return found.masked_fill(missing, 0.0) if between is None else torch.where(missing, between, found)
