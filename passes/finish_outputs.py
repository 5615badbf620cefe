"""The graph's outputs as the runtime expects them.

Dropped keys are taken out (the runtime puts a marker in their place), and so are caches that grew in place (it puts the
longer view). Discovered visual positions and the scores of
partitioned layers are appended (the runtime takes them off again).
"""

from __future__ import annotations

from torch import fx

from avl_fx.passes.context import PassContext
from avl_fx.passes.site import PassResult

__all__ = ["finish_outputs"]


def finish_outputs(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Remove the output positions that earlier stages emptied; append what the runtime wants to know."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    emptied = ctx.emptied()
    returned = [n for i, n in enumerate(output.args[0]) if i not in emptied]
    output.args = (tuple(returned + ctx.returned()),)
    return PassResult("finish_outputs", count=len(emptied))
