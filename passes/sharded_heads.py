"""Tensor parallelism: whose heads a site has, where each process attends with some of them.

Such a model adds up what the processes' heads say behind the output projection. The process group of that sum is found
in the graph, so neither the model nor its plan for sharding is asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, fx

from avl_fx.passes.nodes import VIEW_OPS, fake, op
from avl_fx.passes.rewrite import insert_call
from avl_fx.passes.site import Site

__all__ = ["process_group", "summed_over"]

_SUMS = frozenset({"all_reduce", "all_reduce_", "reduce_scatter_tensor"})
_PRODUCTS = frozenset({"linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "_grouped_mm", "grouped_mm"})


def process_group(site: Site) -> str | None:
    """The name of the process group that has the heads of ``site``, some each; ``None``: this process has them all.

    A sum over processes counts where one projection stands between (for latents two: they become values first), and
    nothing is computed behind that. One that comes later, as that of experts, says nothing of heads.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    assert site.node is not None
    pending = [(site.node, 2 if site.latent else 1)]
    seen = {site.node}
    while pending:
        node, projections = pending.pop()
        for user in node.users:
            name = op(user)
            if name in _SUMS:
                return _named(user.args[-1])
            # Behind the last projection a sum of heads follows at once; what is added or normalised first is complete.
            if user in seen or (projections == 0 and name not in VIEW_OPS):
                continue
            group = _partial_over(user)
            if group is not None:
                return group
            seen.add(user)
            pending.append((user, projections - (name in _PRODUCTS)))
    return None


def _named(group: Any) -> str:
    return group if isinstance(group, str) else group.group_name


def _partial_over(node: fx.Node) -> str | None:
    """The group over which a ``DTensor`` is still to be summed."""
    value = fake(node)
    if not isinstance(value, torch.Tensor):
        return None
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return None
    for dim, placement in enumerate(value.placements):
        if placement.is_partial():
            return value.device_mesh.get_group(dim).group_name
    return None


def summed_over(group: str, before: fx.Node, scores: fx.Node) -> list[fx.Node]:
    """Insert the sum of ``scores`` ``[batch, kv_heads, keys]`` over the heads of all processes, ``[batch, 1, keys]``.

    Returns:
        The new nodes in their order; the last one is the sum, the same numbers in each process.
    """
    own = insert_call(before, torch.ops.aten.sum.dim_IntList, scores, [1], True)
    both = insert_call(before, torch.ops._c10d_functional.all_reduce.default, own, "sum", group)
    return [own, both, insert_call(before, torch.ops._c10d_functional.wait_tensor.default, both)]
