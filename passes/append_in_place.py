"""A decode step stores its row in the spare capacity of a growing cache instead of copying the cache.

A DynamicCache grows by ``cat([past, new])``, which copies every key and value of every layer at every step: more bytes
than attention itself reads. Here the graph of a prompt hands its keys and values to the runtime, which gives them a
buffer with room behind their end (`avl_fx.growing`). A decode graph that finds such room lets
`avl::partitioned_decode` store the row there and attend to it, and returns nothing: the runtime puts the longer view
where the model expects it. Rows that somebody else can see are never written.

A cache that was made elsewhere has no room at first. When it comes back as a decode graph returned it (beams do not:
they are reordered in between), the runtime gives it some.

Which form a graph has is decided when it is compiled, by the strides of the past rows, and guarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from avl_fx.passes.context import GrowingTensor, PassContext
from avl_fx.passes.nodes import METADATA_OPS, alias_root, aliases, fake, hint, op, same_size, shape
from avl_fx.passes.read_ranges import (
    attending,
    decoded_latents,
    decodes,
    read_everything,
    read_ranges,
    take_ranges,
    takes,
)
from avl_fx.passes.rewrite import insert_call, remove_dead
from avl_fx.passes.share_queries import decoder_sites
from avl_fx.passes.site import PassResult, Site, Status

__all__ = ["append_in_place"]

_DECODES = (torch.ops.avl.partitioned_decode.default, torch.ops.avl.latent_decode.default)


def append_in_place(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Rewrite the decoder's sites that attend to ``cat([past, new])`` of one new row each; ask for room elsewhere."""
    result = PassResult("append_in_place")
    if not ctx.spare_rows or (ctx.plan.text_window is not None and ctx.compact is None):
        # A text window lets new rows change places with old ones, which a cache that shares the buffer may still show.
        # A compact cache shares its buffers with nobody.
        return result
    output = next(n for n in gm.graph.nodes if n.op == "output")
    returned = _Returned.of(output.args[0])
    sites = [s for s in decoder_sites(ctx) if s.cache == "dynamic" and s.node is not None and _serves(s)]
    if sites and sites[0].queries != 1:
        ctx.reserve = sorted({p for s in sites for n in _keys_and_values(s) for p in _started(n, returned)})
        return result
    placeholders = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    while sites:
        # What a site reads may only grow in place if everything that reads it can do without the copy.
        readers = {n for s in sites for n in _readers(s)}
        grows = [s for s in sites if all(_grows(n, placeholders, returned, readers) for n in _keys_and_values(s))]
        if len(grows) == len(sites):
            break
        sites = grows
    roots = dict.fromkeys(alias_root(n) for s in sites for n in _keys_and_values(s))
    pasts = [fake(root.args[0][0]) for root in roots]  # type: ignore[index]
    # A symbolic layout takes milliseconds to ask about, and all layers tend to have the same one.
    layouts = {f"{tuple(past.shape)} {past.stride()}": past for past in pasts}
    if not all(map(_has_room, layouts.values())):
        ctx.adopt = [_tensor(root, placeholders, returned) for root in roots]
        return result
    ctx.growing = [_tensor(root, placeholders, returned) for root in roots]
    for site in sites:
        key, value = map(alias_root, _keys_and_values(site))
        if attending(site).target not in _DECODES:
            if ctx.ranges is not None and site.status is Status.REFUSED:
                read_everything(site)  # the ranges are those of layers that are partitioned
            else:
                result.new_inputs += take_ranges(gm, ctx, site)
                read_ranges(site, ctx)
        _store_rows(site, key, value)
        if site.status is Status.FOUND:  # what the plan refused stays refused, whatever its rows do
            site.status = Status.REWRITTEN
        result.count += 1
    grown = {g.output for g in ctx.growing}
    output.args = (tuple(None if i in grown else n for i, n in enumerate(output.args[0])),)
    remove_dead(gm.graph, ctx.initially_unused, keep=ctx.keep())
    return result


@dataclass(frozen=True)
class _Returned:
    """The graph's outputs, and where each tensor or a view of it stands among them."""

    nodes: Sequence[Any]
    positions: dict[fx.Node, list[int]]

    @classmethod
    def of(cls, nodes: Sequence[Any]) -> _Returned:
        positions: dict[fx.Node, list[int]] = {}
        for position, node in enumerate(nodes):
            if isinstance(node, fx.Node):
                positions.setdefault(alias_root(node), []).append(position)
        return cls(nodes, positions)

    def once(self, root: fx.Node) -> int | None:
        """Where ``root`` itself is returned; ``None`` unless that is one place, and no view of it is another."""
        found = self.positions.get(root, [])
        return found[0] if len(found) == 1 and self.nodes[found[0]] is root else None


def _keys_and_values(site: Site) -> list[fx.Node]:
    return list(decoded_latents(site) or attending(site).args[1:3])  # type: ignore[arg-type]


def _readers(site: Site) -> list[fx.Node]:
    """What may read keys and values: attention, and what puts latents and rotated keys together for it alone."""
    reader = attending(site)
    key = reader.args[1]
    return [reader] if decoded_latents(site) is None or len(key.users) > 1 else [reader, key]  # type: ignore[union-attr, list-item]


def _serves(site: Site) -> bool:
    """Whether `avl::partitioned_decode` means the same as this site's attention, in decode steps, or already is it."""
    node = attending(site)
    if site.kind != "full":
        return False
    if node.target is torch.ops.avl.attention.default and site.queries == 1:
        # What a GPU's fused kernels take for a short cache has not been measured against it; none takes latents.
        return decodes(site) and (site.device == "cpu" or decoded_latents(site) is not None)
    # A prompt's is a start; a refused one is as the model wrote it.
    return node.target in (torch.ops.avl.attention.default, *_DECODES) and takes(fake(node.args[0]))


def _started(node: fx.Node, returned: _Returned) -> list[int]:
    """Where the graph returns a cache tensor that later steps will append to."""
    root = alias_root(node)
    position = returned.once(root) if op(root) == "cat" else None
    return [] if position is None else [position]


def _grows(node: fx.Node, placeholders: dict[fx.Node, int], returned: _Returned, allowed: set[fx.Node]) -> bool:
    """Whether ``node`` is ``cat([past, new])`` of one row, kept by the caller and read by ``allowed`` alone."""
    root = alias_root(node)
    if op(root) != "cat" or not isinstance(root.args[0], tuple | list) or len(root.args[0]) != 2:
        return False
    past, new = root.args[0]
    if not isinstance(past, fx.Node) or not isinstance(new, fx.Node) or past not in placeholders:
        return False
    old, added, sizes = shape(past), shape(new), shape(node)
    if old is None or added is None or sizes is None or len(old) != 4 or len(added) != 4 or added[2] != 1:
        return False
    if not same_size(sizes[2], (shape(root) or ())[2]) or fake(new).dtype != fake(past).dtype:
        return False
    if fake(node).dtype != fake(root).dtype:  # autocast: attention reads a copy
        return False
    if fake(past).requires_grad or fake(new).requires_grad:
        return False
    if returned.once(root) is None:
        return False
    known = aliases(root)
    readers = {user for alias in known for user in alias.users if user not in known and user.op != "output"}
    return readers <= allowed and all(user is root or op(user) in METADATA_OPS for user in past.users)


def _tensor(root: fx.Node, placeholders: dict[fx.Node, int], returned: _Returned) -> GrowingTensor:
    position = returned.once(root)
    assert position is not None
    return GrowingTensor(placeholders[root.args[0][0]], position)  # type: ignore[index]


def _has_room(past: torch.Tensor) -> bool:
    """Whether the strides of ``past`` are those of a buffer with room behind the last row of each head.

    Where sizes are symbolic, a yes is a guard: a cache without room is captured anew, and copied as the model asks.
    """
    batch_stride, head_stride, row_stride, _ = past.stride()
    _, heads, keys, dim = past.shape
    sizes = (batch_stride, head_stride, row_stride, keys)
    if None in map(hint, sizes) or past.stride()[3] != 1:
        return False
    if hint(head_stride) < (hint(keys) + 1) * dim:  # type: ignore[operator]
        return False
    whole_rows = row_stride == dim and head_stride % dim == 0 and batch_stride == heads * head_stride
    return bool(whole_rows and head_stride >= (keys + 1) * dim)


def _store_rows(site: Site, key: fx.Node, value: fx.Node) -> None:
    """Let the attention of ``site`` take past and new rows apart."""
    old = attending(site)
    query, _, _, _, _, *rest = old.args
    (past_key, new_key), (past_value, new_value) = cast(Any, key.args[0]), cast(Any, value.args[0])
    both = insert_call(old, old.target, query, past_key, past_value, new_key, new_value, *rest)
    old.replace_all_uses_with(both)
    old.graph.erase_node(old)
