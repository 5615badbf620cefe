"""The rows that a compact cache holds stand for those that the model believes in.

The graph of a model with a compact cache (`avl_fx.cache.AVLCache`) is that of a complete one: lengths, positions and
masks count every token that was ever fed, and `avl::append_rows` returns a row for each of them. Here each one becomes
``cat([stored, new])``, the update of a growing cache, so that later stages see nothing unusual; and the mask of
attention, which has a column for every token, is brought to the rows that are there. Which column a stored row has is
an input of the graph.

Keys that anything but attention reads stay as they are: the operator then insists on a complete cache.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

# Importing the operator registers it.
from avl_fx.kernels.append_rows import append_rows as _append_rows  # noqa: F401
from avl_fx.passes.context import CompactRows, PassContext, StoredTensor
from avl_fx.passes.latents import latents_of, reads_latents
from avl_fx.passes.nodes import fake, op, same_size, shape
from avl_fx.passes.rewrite import add_input, insert_call
from avl_fx.passes.share_queries import same_value
from avl_fx.passes.site import PassResult, Reason, Site, Status

__all__ = ["resolve_rows"]

_MASK, _CAUSAL = 3, 5


def resolve_rows(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Replace every `avl::append_rows` whose rows attention alone reads."""
    result = PassResult("resolve_rows")
    appended = [n for n in gm.graph.nodes if op(n) == "append_rows"]
    if not appended:
        return result
    ctx.compact = CompactRows(plans={n.args[3] for n in appended})
    placeholders = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    sites = [s for s in ctx.sites if s.node is not None and s.status is not Status.REFUSED and _reads(s, ctx)]
    misfits = {n for s in sites if not _mask_fits(s) or (ctx.tracks_visual and _differs(s, sites)) for n in _rows(s)}
    understood = {n for s in sites for n in _rows(s) if ctx.tracks_visual or not _lacks_rows(n)} - misfits
    joined = [s for s in sites if reads_latents(s)]
    readers = {*(s.node for s in sites), *(s.node.args[1] for s in joined)}  # type: ignore[union-attr]
    resolved = [n for n in appended if _starts(n) or (n in understood and _only_read_by(n, readers))]
    for site in sites:
        if not set(_rows(site)) <= set(resolved):
            result.refuse(site, Reason.COMPACT_ROWS)
    for node in appended:
        if not _starts(node):
            ctx.compact.stored.append(_stored(node, placeholders, complete=node not in resolved))
    continued = [s for s in sites if s.status is not Status.REFUSED and not any(map(_starts, _rows(s)))]
    if ctx.tracks_visual and continued:
        result.new_inputs = _fit_masks(gm, ctx, continued)
    for node in resolved:
        grown = insert_call(node, torch.cat, [node.args[0], node.args[1]], 2)
        node.replace_all_uses_with(grown)
        gm.graph.erase_node(node)
        result.count += 1
    for site in joined:
        # As many rows as there are, and not as many as the model believes in.
        key: Any = site.node.args[1]  # type: ignore[union-attr]
        site.node.update_arg(1, insert_call(key, torch.cat, *key.args))  # type: ignore[union-attr]
        gm.graph.erase_node(key)
    return result


def _rows(site: Site) -> list[fx.Node]:
    assert site.node is not None
    return [n for n in latents_of(site) or site.node.args[1:3] if op(n) == "append_rows"]  # type: ignore[misc]


def _reads(site: Site, ctx: PassContext) -> bool:
    assert site.node is not None
    if site.latent and ctx.plan.lazy_policy is not None:
        return False  # latents of a lazy block are not partitioned: all of their rows are there
    return site.node.target is torch.ops.avl.attention.default and bool(_rows(site))


def _starts(node: fx.Node) -> bool:
    """Whether there are no rows yet: then nothing can be missing."""
    return (shape(node.args[0]) or (0, 0, None))[2] == 0


def _lacks_rows(node: fx.Node) -> bool:
    """Whether fewer rows than tokens are there, where both numbers are fixed."""
    rows, length = shape(node.args[0])[2], node.args[2]  # type: ignore[index]
    return isinstance(rows, int) and isinstance(length, int) and rows != length


def _only_read_by(node: fx.Node, readers: set[Any]) -> bool:
    return all(user in readers or user.op == "output" for user in node.users)


def _mask_fits(site: Site) -> bool:
    """Whether the mask has a column for every token."""
    assert site.node is not None
    mask, is_causal = site.node.args[_MASK], site.node.args[_CAUSAL]
    if mask is None:
        return not is_causal
    sizes, keys = shape(mask) or (), shape(site.node.args[1]) or (None,) * 4
    return len(sizes) == 4 and same_size(sizes[3], keys[2])


def _differs(site: Site, sites: list[Site]) -> bool:
    """Whether `partition_modalities` would leave the decode step ``site`` dense, which has to see every row then."""
    first = next((s for s in sites if s.kind == "full"), site)
    if first.queries != 1:
        return False
    assert site.node is not None
    assert first.node is not None
    return site.kind != "full" or not same_value(site.node.args[_MASK], first.node.args[_MASK])


def _stored(node: fx.Node, placeholders: dict[fx.Node, int], complete: bool) -> StoredTensor:
    stored, _, length, _ = node.args
    symbolic = isinstance(length, fx.Node)
    return StoredTensor(
        placeholders[stored],  # type: ignore[index]
        placeholders[length] if symbolic else length,  # type: ignore[index, arg-type]
        symbolic,
        complete,
    )


def _fit_masks(gm: fx.GraphModule, ctx: PassContext, sites: list[Site]) -> tuple[str, ...]:
    """Bring the masks of ``sites`` to the stored rows; returns the names of new inputs."""
    assert ctx.compact is not None
    stored = _rows(sites[0])[0].args[0]
    assert isinstance(stored, fx.Node)
    batch, _, rows, _ = shape(stored) or ()
    ctx.compact.columns = columns = add_input(gm.graph, "avl_columns", (batch, rows), torch.int64, stored)
    known: list[tuple[Any, fx.Node]] = []
    for site in sites:
        assert site.node is not None
        mask = site.node.args[_MASK]
        if mask is None and site.queries == 1:
            continue  # what a step reads are ranges that leave out what is not there
        fitted = next((new for old, new in known if same_value(old, mask)), None)
        if fitted is None:
            fitted = _fitted(site.node, columns, mask, site.node.args[0], _rows(site)[0].args[2])
            known.append((mask, fitted))
        site.node.update_arg(_MASK, fitted)
        site.mask = "bool" if fake(fitted).dtype == torch.bool else "additive"
    return (columns.name,)


def _fitted(before: fx.Node, columns: fx.Node, mask: Any, query: Any, length: Any) -> fx.Node:
    """The mask over stored rows and new ones, inserted ``before``.

    Args:
        before: a node of the graph.
        columns: int64 ``[batch, rows]``.
        mask: ``[batch or 1, heads or 1, queries or 1, tokens]``, the new ones included; ``None``: all are visible.
        query: ``[batch, heads, queries, head_dim]``.
        length: tokens before the new ones, a number or a node.
    """

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(before, target, *args, **kwargs)

    columns = call(operator.getitem, columns, (slice(None), None, None))
    there = call(torch.ge, columns, 0)
    if mask is None:
        new = call(operator.getitem, query, (slice(None), slice(None, 1), None, slice(None), 0))
        return call(torch.cat, [there, call(torch.ones_like, new, dtype=torch.bool)], 3)

    def size(node: fx.Node, dim: int) -> Any:
        known = shape(node)[dim]  # type: ignore[index]
        return known if isinstance(known, int) else call("size", node, dim)

    if not same_size(shape(mask)[0], shape(columns)[0]):  # type: ignore[index]
        mask = call("expand", mask, size(columns, 0), -1, -1, -1)
    # Not `take_along_dim`: it fixes the sizes that it sees.
    index = call("expand", call("clamp", columns, min=0), -1, size(mask, 1), size(mask, 2), -1)
    old = call("gather", mask, 3, index)
    new = call(operator.getitem, mask, (slice(None), slice(None), slice(None), slice(length, None)))
    dtype = fake(mask).dtype
    if dtype == torch.bool:
        return call(torch.cat, [call(torch.logical_and, old, there), new], 3)
    hidden = call("masked_fill", old, call(torch.logical_not, there), torch.finfo(dtype).min)
    return call(torch.cat, [hidden, new], 3)
