"""Which sites see visual keys, and where the row-wise visual positions come from.

Never guessed. Positions are *discovered* where the graph itself splices image features into the embeddings under a
boolean mask (`masked_scatter`, indexed assignment, `where`), unless it is a mask of tokens that stand for audio;
*carried* where an earlier graph of the same forward did, or *given* by the user or by the hook of `avl_fx.compile`.
Otherwise they are unknown, and policies that need them do not apply.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from avl_fx.passes.context import PassContext, VisualSource
from avl_fx.passes.nodes import (
    VIEW_OPS,
    alias_root,
    arg,
    fake,
    op,
    same_shape,
    shape,
    where_args,
    writes_to,
    written_between,
)
from avl_fx.passes.rewrite import insert_call
from avl_fx.passes.share_queries import decoder_sites
from avl_fx.passes.site import PassResult

__all__ = ["locate_modalities"]

_FILLS = frozenset(
    {"zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_full", "empty_like"}
    | {"empty", "new_empty", "new_ones"}
)
_UNIONS = frozenset({"bitwise_or", "logical_or"})
_NEGATIONS = frozenset({"invert", "bitwise_not", "logical_not"})


def locate_modalities(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Find the visual positions of ``gm`` and note on every decoder site where they come from.

    Sets ``ctx.visual`` when the graph itself tells; its node is a boolean ``[batch, sequence]``.
    """
    result = PassResult("locate_modalities")
    audio = _audio_masks(gm, ctx)
    masks = _splice_masks(gm, ctx, audio)
    if masks:
        ctx.visual = VisualSource("discovered", _row_mask(gm, masks))
    elif ctx.carried_visual is not None:
        ctx.visual = VisualSource(ctx.carried_visual, None)
    if ctx.visual is not None:
        for site in decoder_sites(ctx):
            site.visual = ctx.visual.how
            result.count += 1
    return result


def _audio_masks(gm: fx.GraphModule, ctx: PassContext) -> frozenset[fx.Node]:
    """Masks of tokens that stand for audio; an earlier graph may have made them, and a later one may use them."""
    if not ctx.audio_ids and not ctx.audio_masks:
        return frozenset()
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    found = {node for position, node in enumerate(inputs) if position in ctx.audio_masks}
    for node in gm.graph.nodes:
        if op(node) in VIEW_OPS:
            same = node.args[0] in found
        elif op(node) in _UNIONS:
            operands = _operands(node)
            same = len(operands) == 2 and found.issuperset(operands)
        else:
            same = op(node) == "eq" and _from_token_ids(node) and node.args[-1] in ctx.audio_ids
        if same and not writes_to(node):  # something else may be written into a mask
            found.add(node)
    returned = gm.graph.output_node().args[0]
    assert isinstance(returned, tuple | list)
    ctx.returned_audio_masks = tuple(i for i, n in enumerate(returned) if isinstance(n, fx.Node) and n in found)
    return frozenset(found)


def _splice_masks(gm: fx.GraphModule, ctx: PassContext, audio: frozenset[fx.Node]) -> list[fx.Node]:
    """The masks of all splices into the decoder's sequence; empty when several sequences are spliced into, or where one
    is written to later: what it says depends on when it is asked."""
    spliced = (m for m in map(_splice_mask, gm.graph.nodes) if m is not None and m not in audio)
    masks = list(dict.fromkeys(map(_moved, spliced)))
    rows = {tuple(map(str, (shape(m) or ())[:2])) for m in masks}
    if len(rows) > 1:
        # A masked image model splices into its patches as well: only the decoder's own sequence counts.
        rows &= {(str(site.batch), str(site.queries)) for site in decoder_sites(ctx)}
        masks = [m for m in masks if tuple(map(str, (shape(m) or ())[:2])) in rows]
    written = any(written_between(m, m.next, gm.graph.output_node()) for m in masks)
    return masks if len(rows) == 1 and not written else []


def _splice_mask(node: fx.Node) -> fx.Node | None:
    """The mask under which ``node`` writes features into embeddings ``[batch, sequence, hidden]``."""
    name = op(node)
    if name in ("masked_scatter", "masked_scatter_"):
        target, mask = arg(node, 0, "input"), arg(node, 1, "mask")
    elif name == "where":
        mask, *branches = where_args(node)
        target = node
        if not _from_token_ids(mask) or not all(same_shape(b, node) and op(b) not in _FILLS for b in branches):
            return None
    elif name == "setitem":
        target, mask = node.args[0], node.args[1]
        # Experts of text and of images put their halves together so: one of these masks is of text.
        if not isinstance(target, fx.Node) or op(alias_root(target)) in _FILLS or op(mask) in _NEGATIONS:
            return None
        # One feature a position: a number or a single vector is padding or a mask token.
        if len(shape(node.args[2]) or ()) + len(shape(mask) or ()) != 4:
            return None
    else:
        return None
    embeds, flags = shape(target), fake(mask)
    if embeds is None or len(embeds) != 3 or not isinstance(flags, torch.Tensor) or flags.dtype != torch.bool:
        return None
    if flags.dim() not in (2, 3) or [str(s) for s in flags.shape[:2]] != [str(s) for s in embeds[:2]]:
        return None
    return mask


def _moved(mask: fx.Node) -> fx.Node:
    """What ``mask`` was before it was moved to the device of a layer: features may be added in front of several."""
    while op(mask) == "to" and isinstance(source := mask.args[0], fx.Node):
        if fake(source).dtype != torch.bool or not same_shape(source, mask):
            break
        mask = source
    return mask


def _from_token_ids(mask: Any, limit: int = 8) -> bool:
    """Whether a mask says where integer ids ``[batch, sequence]`` equal a constant, or one of several."""
    name = op(mask)
    if limit == 0 or not _operands(mask):
        return False
    if name in ("eq", "isin"):
        ids = fake(_operands(mask)[0])
        return isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.dtype.is_floating_point
    # Nothing but shapes and unions: a negation would turn text into images.
    if name in VIEW_OPS:
        return _from_token_ids(mask.args[0], limit - 1)
    return name in _UNIONS and all(_from_token_ids(m, limit - 1) for m in _operands(mask))


def _operands(mask: Any) -> list[fx.Node]:
    return [n for n in mask.args if isinstance(n, fx.Node)] if isinstance(mask, fx.Node) else []


def _row_mask(gm: fx.GraphModule, masks: list[fx.Node]) -> fx.Node:
    """Union of ``masks`` as ``[batch, sequence]``, inserted as early as can be: layers behind them may use it."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    last = [n for n in gm.graph.nodes if n in masks][-1]
    before = inputs[-1].next if last.op == "placeholder" else last.next
    union: fx.Node | None = None
    for mask in masks:
        row = mask
        if len(shape(mask) or ()) == 3:
            row = insert_call(before, operator.getitem, mask, (slice(None), slice(None), 0))
        union = row if union is None else insert_call(before, torch.logical_or, union, row)
    assert union is not None
    return union
