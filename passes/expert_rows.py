"""Which parts of a graph sort tokens by expert, compute, and put them back: each token's result is its own.

Mixtures of experts that compute with one grouped product a layer do

    ids, order = sort(experts of all tokens, flat)           # [pairs], pairs = tokens * experts per token
    rows, weights = hidden[order // per_token], scores[order]
    offsets = cumsum(histc(ids, experts, 0, experts - 1))
    out = grouped_mm(act(grouped_mm(rows, up, offs=offsets)), down, offs=offsets) * weights
    back = empty_like(order); back[order] = arange(pairs)
    out[back]

Seen node by node, a sort mixes tokens, and so does every look-up by its result. As a whole it does not. Row ``j`` in
between belongs to pair ``order[j]`` and depends on nothing else: what is looked up is that pair's, an elementwise
operation or a linear layer keeps to its row, and a grouped product multiplies row ``j`` by the weights of expert ``e``
where ``offsets[e - 1] <= j < offsets[e]``, which, between sorted ids whose numbers are the histogram's, says that
``ids[j] == e``. The inverse permutation puts row ``j`` where pair ``order[j]`` was. So it may run on fewer tokens
(`fewer_rows`), if nothing of it is seen from outside but what was put back. That is what `expert_rows` proves; what it
cannot follow is left to be refused.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from avl_fx.passes.nodes import METADATA_OPS, arg, const, fake, mutated_inputs, op, places, shape

__all__ = ["ExpertRows", "expert_rows"]

_CASTS = frozenset({"to", "type", "float", "double", "int", "long", "contiguous"})
_WIDE_ENOUGH = frozenset({torch.int32, torch.int64, torch.float32, torch.float64})
_GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
_RESHAPES = frozenset({"view", "reshape", "unflatten"})
_KEEPS_ROWS = _RESHAPES | frozenset(
    {"linear", "matmul", "chunk", "split", "unbind", "unsqueeze", "squeeze", "flatten", "getitem", "contiguous"}
    | {"mean", "sum", "to", "type", "float", "half", "bfloat16"}
)
"""Keep to their row wherever the rows come out as they went in: one dimension, the first."""


class _Role(enum.Enum):
    """What a node of such a part holds. ``pairs`` numbers are in sorted order unless it is said otherwise."""

    ORDER = "the pair that row j belongs to"
    TOKEN = "the token of that pair"
    IDS = "the expert of row j, ascending"
    ROW = "something of the pair of row j alone"
    COUNTS = "how many pairs each expert has"
    OFFSETS = "where the rows of each expert end"
    ROOM = "nothing yet"
    BACK = "in the order of pairs: the row of pair i"
    PUT_BACK = "in the order of pairs: something of pair i alone"


class ExpertRows(NamedTuple):
    """The parts of a graph that could be followed to their end."""

    nodes: frozenset[fx.Node]
    """What may look like mixing tokens, and does not."""
    numbered: dict[fx.Node, fx.Node]
    """``back[order] = arange(pairs)`` -> ``order``. Pairs are numbered anew when there are fewer of them."""


def expert_rows(graph: fx.Graph) -> ExpertRows:
    """Find all such parts; nothing of one that is not understood as a whole is among them."""
    parts = [_Part(node) for node in graph.nodes if op(node) == "sort" and _sorts_ids(node)]
    understood = [part for part in parts if part.follow()]
    nodes = (node for part in understood for node in (part.sort, *part.roles))
    return ExpertRows(frozenset(nodes), {k: v for part in understood for k, v in part.numbered.items()})


class _Part:
    """What follows from one sort, as far as it is understood."""

    def __init__(self, sort: fx.Node) -> None:
        self.sort = sort
        self.pairs = _expression(fake(sort.args[0]).shape[0])
        self.per_token: int | None = None
        self.roles: dict[fx.Node, _Role] = {}
        self.numbered: dict[fx.Node, fx.Node] = {}

    def follow(self) -> bool:
        """Find out what everything behind the sort holds; whether all of it was understood."""
        node = self.sort.next
        while node.op != "root":
            inside = [n for n in node.all_input_nodes if n is self.sort or self._of(n) not in (None, _Role.PUT_BACK)]
            if inside and op(node) not in METADATA_OPS:
                role = self._role(node)
                if role is None:
                    return False
                self.roles[node] = role
            node = node.next
        return True

    def _of(self, node: Any) -> _Role | None:
        return self.roles.get(node) if isinstance(node, fx.Node) else None

    def _role(self, node: fx.Node) -> _Role | None:
        name, first = op(node), node.args[0] if node.args else None
        if first is self.sort:
            return {0: _Role.IDS, 1: _Role.ORDER}.get(node.args[1]) if name == "getitem" else None  # type: ignore[arg-type]
        own = self._of(first)
        if mutated_inputs(node) and name != "setitem":
            return self._row(node) if own is _Role.ROW and self._is_rows_alone(first, mutated_inputs(node)) else None
        if name in _CASTS and own not in (None, _Role.ROW):
            return own if fake(node).dtype in _WIDE_ENOUGH else None
        if name in ("getitem", "index_select") and (index := _lookup(node)) is not None:
            return self._looked_up(first, own, index)
        match name, own:
            case (("floordiv" | "floor_divide"), _Role.ORDER):
                return self._token(node)
            case (("empty_like" | "zeros_like"), _Role.ORDER):
                return _Role.ROOM
            case "setitem", _Role.ROOM:
                return self._inverse(node)
            case "argsort", _Role.ORDER:
                return _Role.BACK if _ascending(node, 1) else None
            case "histc", _Role.IDS:
                return _Role.COUNTS if _counts_integers(node) else None
            case "cumsum", _Role.COUNTS:
                return _Role.OFFSETS if fake(node).dtype in _WIDE_ENOUGH else None
        if name in _GROUPED:
            return self._product(node)
        return self._row(node)

    def _is_rows_alone(self, target: Any, written: tuple[fx.Node, ...]) -> bool:
        """Whether ``target`` is all that is written, and no view of ids or of anything else that must stay."""
        others = (node for node, role in self.roles.items() if role is not _Role.ROW)
        return written == (target,) and all(places(target).isdisjoint(places(node)) for node in others)

    def _token(self, node: fx.Node) -> _Role | None:
        per_token = node.args[1]
        if not isinstance(per_token, int) or per_token < 1 or self.per_token not in (None, per_token):
            return None
        self.per_token = per_token
        return _Role.TOKEN

    def _inverse(self, node: fx.Node) -> _Role | None:
        """``room[order] = arange(pairs)``: from here on the room holds the inverse permutation."""
        room, index, numbers = node.args
        if isinstance(index, tuple | list):
            index = index[0] if len(index) == 1 else None
        if self._of(index) is not _Role.ORDER or not _counts_up(numbers) or not self._whole(fake(numbers)):
            return None
        self.roles[room] = _Role.BACK  # type: ignore[index]
        self.numbered[node] = index  # type: ignore[assignment]
        return _Role.BACK

    def _looked_up(self, source: Any, own: _Role | None, index: fx.Node) -> _Role | None:
        """What ``source`` holds at the places that ``index`` names along its first dimension."""
        by, sizes = self._of(index), shape(source)
        if not sizes:
            return None
        if own is _Role.ROW:
            return _Role.PUT_BACK if by is _Role.BACK else None
        if own is not None:
            return None
        if by is _Role.ORDER:
            return _Role.ROW if _expression(sizes[0]) == self.pairs else None
        if by is _Role.TOKEN:
            return _Role.ROW if _expression(sizes[0]) * self.per_token == self.pairs else None
        return _Role.ROW if by is _Role.IDS and isinstance(sizes[0], int) else None

    def _product(self, node: fx.Node) -> _Role | None:
        rows, weight = arg(node, 0, "input"), arg(node, 1, "weight")
        others = [n for n in node.all_input_nodes if n not in (rows, weight)]
        if self._of(rows) is not _Role.ROW or not _constant(fake(weight)) or not self._whole(fake(node)):
            return None
        return _Role.ROW if [self._of(n) for n in others] == [_Role.OFFSETS] else None

    def _row(self, node: fx.Node) -> _Role | None:
        """Operations that keep to their row, on rows and constants."""
        if op(node) not in _KEEPS_ROWS and not _is_pointwise(op(node)):
            return None
        for source in node.all_input_nodes:
            role, value = self._of(source), fake(source)
            is_size = op(node) in _RESHAPES and isinstance(value, torch.SymInt)
            if role not in (_Role.ROW, _Role.IDS) and (role is not None or not (_constant(value) or is_size)):
                return None
        leaves = [leaf for leaf in pytree.tree_leaves(fake(node)) if isinstance(leaf, Tensor)]
        return _Role.ROW if leaves and all(map(self._whole, leaves)) else None

    def _whole(self, value: Any) -> bool:
        """Whether ``value`` has a row for every pair: in its first dimension, and nowhere else."""
        if not isinstance(value, Tensor) or value.dim() == 0 or _expression(value.shape[0]) != self.pairs:
            return False
        return all(isinstance(size, int) for size in value.shape[1:])


def _sorts_ids(node: fx.Node) -> bool:
    ids = fake(node.args[0]) if node.args else None
    if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype.is_floating_point:
        return False
    return isinstance(ids.shape[0], torch.SymInt) and _ascending(node, 2)


def _ascending(node: fx.Node, position: int) -> bool:
    return not arg(node, position, "descending", False) and "out" not in node.kwargs


def _counts_integers(node: fx.Node) -> bool:
    """Whether bin ``e`` of a histogram counts the number ``e`` and nothing else."""
    bins, low, high = arg(node, 1, "bins"), arg(node, 2, "min"), arg(node, 3, "max")
    return isinstance(bins, int) and const(low) == 0 and const(high) == bins - 1


def _counts_up(node: Any) -> bool:
    """Whether ``node`` is 0, 1, 2, ..."""
    if op(node) != "arange" or not set(node.kwargs) <= {"device", "dtype", "layout", "pin_memory"}:
        return False
    return len(node.args) == 1 or (len(node.args) == 2 and const(node.args[0]) == 0)


def _lookup(node: fx.Node) -> fx.Node | None:
    """What ``node`` is looked up by along its first dimension, whole rows; ``None``: it is no such look-up."""
    if op(node) == "index_select":
        index = arg(node, 2, "index")
        return index if arg(node, 1, "dim") == 0 else None
    parts = node.args[1] if isinstance(node.args[1], tuple | list) else (node.args[1],)
    whole = all(part in (slice(None), Ellipsis) for part in parts[1:])
    first = fake(parts[0])
    return parts[0] if whole and isinstance(first, Tensor) and first.dim() == 1 else None  # type: ignore[return-value]


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = (getattr(packet, overload) for overload in packet.overloads()) if packet is not None else ()
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def _constant(value: Any) -> bool:
    return isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
