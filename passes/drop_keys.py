"""Lets go of the keys of a lazy layer, wherever the model stores them.

Three kinds of storage are understood: keys returned by the graph (a DynamicCache), a buffer written in place (a
StaticCache, also one that slides), and a buffer that this very graph allocates and returns (a StaticCache at its first
use). Anything else that reads the keys keeps them alive, and the layer is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from avl_fx.passes.context import DroppedKeys, PassContext
from avl_fx.passes.nodes import METADATA_OPS, alias_root, aliases, fake, mutated_input, op, same_size, shape, writes_to
from avl_fx.passes.site import Reason, Site

__all__ = ["drop_keys", "output_positions", "readers"]


def drop_keys(
    gm: fx.GraphModule, site: Site, key: fx.Node, value: fx.Node, ctx: PassContext, removable: list[fx.Node]
) -> tuple[Reason, str] | None:
    """Stop storing ``key``; a refusal changes nothing.

    Args:
        gm: the graph; the canonical node of ``site`` already reads its anchor's key.
        site: the lazy site.
        key: its own key, ``[batch, kv_heads, keys, head_dim]``.
        value: its own value.
        ctx: receives a `DroppedKeys` for every place where keys are no longer stored.
        removable: receives the buffers whose writes `remove_dead` may remove.
    """
    assert site.layer is not None
    root = alias_root(key)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    returned: list[Any] = list(output.args[0])
    head_dim = (shape(key) or (0,))[-1]
    buffers = _buffers(root)
    if buffers is None:
        return Reason.KEYS_ESCAPE, "something else reads them"
    drops: list[DroppedKeys] = []
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for buffer in buffers:
        positions = output_positions(returned, buffer)
        if buffer.op == "placeholder":
            drops.append(DroppedKeys(site.layer, head_dim, placeholder=placeholders.index(buffer)))
        elif len(positions) == 1:
            # A static cache that this very graph allocates: the buffer stays, nothing is written into it.
            drops.append(DroppedKeys(site.layer, head_dim, output=positions[0]))
        elif positions:
            return Reason.KEYS_ESCAPE, f"returned {len(positions)} times"
    emptied = [] if root in buffers else output_positions(returned, root)
    if emptied:
        like = output_positions(returned, alias_root(value))
        if len(emptied) != 1 or len(like) != 1:
            return Reason.KEYS_ESCAPE, f"keys are returned {len(emptied)} times, values {len(like)} times"
        if not _marker_fits(returned[emptied[0]], returned[like[0]], head_dim):
            return Reason.KEYS_ESCAPE, "keys are returned in another shape than values"
        dtype = fake(returned[emptied[0]]).dtype
        drops.append(DroppedKeys(site.layer, head_dim, output=emptied[0], like_output=like[0], dtype=dtype))
        # The position is only emptied: `finish_outputs` closes the gaps once all layers are done.
        returned[emptied[0]] = None
        output.args = (tuple(returned),)
    for buffer in buffers:
        for write in [n for n in gm.graph.nodes if mutated_input(n) is not None and alias_root(n) is buffer]:
            # An in-place op returns its target: whoever used the result now reads the target itself.
            write.replace_all_uses_with(mutated_input(write))
    removable += buffers
    ctx.dropped_keys += drops
    return None


def _marker_fits(key: fx.Node, value: fx.Node, head_dim: int) -> bool:
    """Whether a marker, which takes everything but its last dimension from ``value``, can stand for ``key``.

    Only a provable difference speaks against it: Dynamo gives the length of every cached tensor a symbol of its own,
    and that keys and values of one layer are of one length is what their attention itself requires.
    """
    wanted = (*(shape(value) or ())[:-1], head_dim)
    own = shape(key) or ()
    if len(own) != len(wanted):
        return False
    sizes = zip(own, wanted, strict=True)
    return all(same_size(a, b) or not (isinstance(a, int) or isinstance(b, int)) for a, b in sizes)


def output_positions(returned: Sequence[Any], root: fx.Node) -> list[int]:
    """Output positions that hold ``root`` or a view of it."""
    return [i for i, n in enumerate(returned) if isinstance(n, fx.Node) and alias_root(n) is root]


def _buffers(root: fx.Node) -> list[fx.Node] | None:
    """Static key buffers that the keys ``root`` are written to; ``None`` when anything else reads keys or buffers.

    ``root`` is itself such a buffer when the site read its keys from the cache.
    """
    if _is_written(root):
        return [root] if not readers(root) else None
    buffers: list[fx.Node] = []
    for reader in readers(root):
        target = mutated_input(reader)
        if target is None:
            return None
        buffer = alias_root(target)
        if readers(buffer):
            return None
        if buffer not in buffers:
            buffers.append(buffer)
    return buffers


def _is_written(root: fx.Node) -> bool:
    return bool(writes_to(root))


def readers(root: fx.Node) -> list[fx.Node]:
    """Nodes that read elements of ``root``, apart from views, writes to ``root`` itself and the graph's output.

    A buffer that is rolled into itself (a full sliding window) reads itself: that does not count either.
    """
    known = aliases(root)
    found = []
    for alias in known:
        for user in alias.users:
            if user in known or user.op == "output" or op(user) in METADATA_OPS or user in found:
                continue
            if not _only_feeds(user, root):
                found.append(user)
    return found


def _only_feeds(node: fx.Node, root: fx.Node, limit: int = 20) -> bool:
    """Whether everything made from ``node`` ends in a write to ``root``."""
    if node.op == "output" or limit == 0:
        return False
    target = mutated_input(node)
    if target is not None and alias_root(target) is root:
        return True
    # A write into the intermediate itself (the newest key, put into the rolled window) leads nowhere else.
    onward = [u for u in node.users if not _writes_to(u, node)]
    return bool(onward) and all(_only_feeds(user, root, limit - 1) for user in onward)


def _writes_to(node: fx.Node, buffer: fx.Node) -> bool:
    target = mutated_input(node)
    return target is not None and alias_root(target) is buffer and not node.users
