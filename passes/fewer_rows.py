"""Runs a part of a graph on fewer positions of the sequence than the rest.

A graph that was captured for any length writes that length as one symbol. Everything that depends on one hidden state
is a function of it, so the same nodes serve any other length: what flows in from elsewhere is taken at the positions
that are left, the symbol gives way to their number, and what flows out is put back where it belongs. Each node is run
again on fake tensors; one that does not come out as before, but for the length, stops it all, and the graph is as it
was.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols
from torch.utils import _pytree as pytree

from avl_fx.passes.expert_rows import expert_rows
from avl_fx.passes.nodes import arg, fake, mutated_inputs, op, places, shape
from avl_fx.passes.rewrite import insert_call

__all__ = ["CannotShorten", "FewerRows", "tail_of"]

_READS_POSITIONS = frozenset({"attention", "visual_scores"})
"""Reduce over the sequence, and mean it."""

_READS_NOTHING = frozenset({"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"})
"""Take the dtype and the device of a tensor."""

_MIXES_POSITIONS = frozenset(
    {"cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "roll", "flip", "sort", "argsort", "conv1d", "conv2d"}
    | {"scaled_dot_product_attention", "flex_attention"}
)
"""Hand tokens on to others in ways that nothing here understands; what only fills up a batch row would come along."""

_ALONG: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("softmax", "log_softmax", "softmin"), (1, None)),
    "normalize": (2, 1),
    **dict.fromkeys(("index_select", "gather", "index_copy", "index_add", "index_fill", "index_reduce"), (1, None)),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), (1, None)),
}
"""Relate elements along one dimension without that showing in the sizes of what comes out -> position of the argument
``dim``, and what it is where it is not given (``None``: not known). In place with an underscore."""

_ANYWHERE = frozenset({"take", "put", "index_put", "masked_scatter"})
"""Read or write at places that a tensor names, in several dimensions."""


class CannotShorten(Exception):
    """Why a part of a graph cannot run on fewer positions; its text goes into a report."""


class FewerRows:
    """Rewrites everything that depends on ``cut`` to run on ``rows``; nothing happens before `commit`.

    Args:
        cut: the hidden state ``[batch, tokens, ...]``.
        rows: int64 ``[batch, left]``, ascending positions that are left, made before anything that depends on ``cut``.

    Raises:
        CannotShorten: see there. Nodes that were inserted meanwhile are gone.
    """

    def __init__(self, cut: fx.Node, rows: fx.Node) -> None:
        self.graph, self.cut, self.rows = cut.graph, cut, rows
        batch, tokens, *_ = shape(cut) or ()
        if isinstance(tokens, int):
            raise CannotShorten("the length is a constant")
        # Of tensors with as many rows as there are batch rows, a symbol alone says which of them mean the batch.
        if isinstance(batch, int) and batch != 1:
            raise CannotShorten("the batch size is a constant")
        if str(batch) == str(tokens):
            raise CannotShorten("batch size and length are one symbol")
        self.batch, self.tokens = batch, tokens.node.expr
        self.alone = isinstance(batch, int)
        """One batch row: no row has to be filled up."""
        self.left = (shape(rows) or ())[1]
        self._inserted: list[fx.Node] = []
        self._taken: dict[fx.Node, fx.Node] = {}
        self._values: dict[fx.Node, Any] = {}
        self._arguments: dict[fx.Node, tuple[Any, Any]] = {}
        self._rewired: list[tuple[fx.Node, Any]] = []
        self._experts = self._number_experts()
        depending = list(_depending(cut))
        self._written = _written_behind(cut, depending)
        try:
            for node in depending:
                self._rerun(node)
        except BaseException:
            self.roll_back()
            raise

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """What runs on fewer positions, in order."""
        return tuple(self._values)

    def roll_back(self) -> None:
        """Take out what was inserted."""
        for node, args in self._rewired:
            node.args = args
        for node in reversed(self._inserted):
            self.graph.erase_node(node)
        self._inserted.clear()

    def dims_of(self, node: fx.Node) -> list[int]:
        """The dimensions of ``node`` that are the sequence.

        Raises:
            CannotShorten: one of them is computed from its length.
        """
        return self._dims(node, self.tokens) + self._dims(node, self.left.node.expr)

    def depends(self, node: Any) -> bool:
        """Whether ``node`` runs on fewer positions."""
        return node in self._values

    def commit(self) -> None:
        """Let the nodes run on fewer positions."""
        for node, value in self._values.items():
            node.args, node.kwargs = self._arguments[node]
            node.meta["example_value"] = value

    def put_back(self, node: fx.Node, before: fx.Node, fill: float) -> fx.Node:
        """After `commit`: ``node`` among all positions, ``fill`` at those that are not left, made before ``before``.

        It has the sequence in one dimension.
        """
        dims = self.dims_of(node)
        tokens = insert_call(before, "size", self.cut, 1)
        sizes = [tokens if d in dims else self._size(node, d, before) for d in range(fake(node).dim())]
        whole = insert_call(before, "new_full", node, tuple(sizes), fill)
        if self.alone:
            return insert_call(before, torch.index_copy, whole, dims[0], self._row(before), node)
        return insert_call(before, torch.scatter, whole, dims[0], self._index(node, dims[0], before), node)

    def _number_experts(self) -> frozenset[fx.Node]:
        """What sorts tokens by expert and puts them back; behind the cut, pairs are numbered by their own count."""
        nodes, numbered = expert_rows(self.graph)
        for write, order in numbered.items():
            if order > self.cut:
                numbers = write.args[2]
                size = self._insert(write, "size", order, 0)
                own = self._insert(write, torch.arange, size, **numbers.kwargs)  # type: ignore[union-attr]
                self._rewired.append((write, write.args))
                write.args = (*write.args[:2], own)
        return nodes

    # ---- one node after the other ----------------------------------------------------------------------------------

    def _rerun(self, node: fx.Node) -> None:
        if node.op not in ("call_function", "call_method"):
            raise CannotShorten(f"{node.name} is a {node.op}")
        old = fake(node)
        if any(free_unbacked_symbols(value) for value in _sized(old)):
            raise CannotShorten(f"the size of {node.name} depends on data")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._source(source, node))
        values = fx.node.map_arg((args, kwargs), lambda source: self._values.get(source, fake(source)))
        mode = fake(self.cut).fake_mode
        try:
            with mode:
                if node.op == "call_method":
                    new = getattr(values[0][0], str(node.target))(*values[0][1:], **values[1])
                else:
                    new = node.target(*values[0], **values[1])  # type: ignore[operator]
        except Exception as error:
            raise CannotShorten(f"{node.name}: {str(error).splitlines()[0] if str(error) else error!r}") from error
        self._compare(node, old, new)
        if node not in self._experts:
            self._check_mixing(node, old)
            self._check_reduction(node, old)
        self._values[node] = new
        self._arguments[node] = (args, kwargs)

    def _compare(self, node: fx.Node, old: Any, new: Any) -> None:
        """Whether ``new`` is ``old`` with another length."""
        before, after = (pytree.tree_flatten(value) for value in (old, new))
        same = before[1] == after[1]
        for left, right in zip(before[0], after[0], strict=False) if same else ():
            if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
                same &= left.dtype == right.dtype and left.dim() == right.dim()
                same = same and all(map(self._same_size, left.shape, right.shape))
            elif isinstance(left, int | torch.SymInt) and not isinstance(left, bool):
                same &= isinstance(right, int | torch.SymInt) and self._same_size(left, right)
            else:
                same &= type(left) is type(right)
        if not same:
            raise CannotShorten(f"{node.name} comes out otherwise on fewer tokens")

    def _same_size(self, old: Any, new: Any) -> bool:
        old, new = (size.node.expr if isinstance(size, torch.SymInt) else size for size in (old, new))
        wanted = old if isinstance(old, int) else old.subs(self.tokens, self.left.node.expr)
        return bool(wanted == new)

    def _check_mixing(self, node: fx.Node, old: Any) -> None:
        """Nothing but attention that is understood lets one token see another."""
        if op(node) in _MIXES_POSITIONS or self._relates_along(node):
            raise CannotShorten(f"{node.name} may mix tokens")
        for size in (size for value in _sized(old) if isinstance(value, torch.Tensor) for size in value.shape):
            if isinstance(size, torch.SymInt) and self._has_tokens(size) and size.node.expr.is_Add:
                raise CannotShorten(f"{node.name} shifts tokens")
        if not self.alone and isinstance(old, torch.Tensor) and len(_dims_of(node, self.tokens)) > 1:
            raise CannotShorten(f"{node.name} relates tokens to each other")

    def _relates_along(self, node: fx.Node) -> bool:
        """Whether elements are related, looked up or put somewhere along a dimension that is the sequence."""
        name, first = op(node).removesuffix("_"), node.args[0] if node.args else None
        value = fake(first)
        if not isinstance(value, torch.Tensor):
            return False
        sequence = {dim for dim, size in enumerate(value.shape) if self._has_tokens(size)}
        if name in ("getitem", "setitem"):
            return self._places_named(node, value, sequence)
        if name in _ANYWHERE:
            return bool(sequence)
        if name not in _ALONG or not sequence:
            return False
        dim = arg(node, _ALONG[name][0], "dim", _ALONG[name][1])
        return not isinstance(dim, int) or dim % value.dim() in sequence

    def _places_named(self, node: fx.Node, value: torch.Tensor, sequence: set[int]) -> bool:
        """Of ``value[index]``: whether a tensor names places in the sequence, or tokens name places elsewhere.

        Under a mask of tokens, what is written may be the same everywhere.
        """
        index = node.args[1] if isinstance(node.args[1], tuple | list) else (node.args[1],)
        parts = [(part, fake(part)) for part in index if part is not None]
        known = sum(_span(part, named) for part, named in parts)
        dim = 0
        for part, named in parts:
            span = value.dim() - known if part is Ellipsis else _span(part, named)
            hit = not sequence.isdisjoint(range(dim, dim + span))
            dim += span
            if not isinstance(named, torch.Tensor):
                continue
            if op(node) == "setitem":
                written = fake(node.args[2])
                rank = written.dim() if isinstance(written, torch.Tensor) else 0
                if hit != self._has_tokens(named) or (hit and not (_is_mask(named) and rank <= value.dim() - span)):
                    return True
            elif hit:
                return True
        return False

    def _check_reduction(self, node: fx.Node, old: Any) -> None:
        """Positions are counted from the end of the sequence, or not at all."""
        if op(node) in _READS_POSITIONS | _READS_NOTHING or not isinstance(old, torch.Tensor) or self._has_tokens(old):
            return
        if not any(isinstance(v := fake(n), torch.Tensor) and self._has_tokens(v) for n in node.all_input_nodes):
            return
        if _tail(node, self.tokens) is None:
            raise CannotShorten(f"{node.name} picks positions, or reduces over them")

    # ---- what flows in -----------------------------------------------------------------------------------------------

    def _source(self, source: fx.Node, before: fx.Node) -> fx.Node:
        """What ``before`` takes instead of ``source``."""
        if source in self._values:
            return source
        value = fake(source)
        if isinstance(value, torch.SymInt):
            return self._size_of_left(source, value, before)
        if not self._has_tokens(value):
            return source
        if not isinstance(value, torch.Tensor):
            raise CannotShorten(f"{source.name} is no tensor")
        if places(source) & self._written:
            raise CannotShorten(f"{source.name} is written to")
        if source not in self._taken:
            self._taken[source] = self._take(source, before)
        return self._taken[source]

    def _size_of_left(self, source: fx.Node, value: torch.SymInt, before: fx.Node) -> fx.Node:
        if not self._has_tokens(value):
            return source
        if source not in self._taken:
            self._taken[source] = self._count_of_left(source, value, before)
        return self._taken[source]

    def _count_of_left(self, source: fx.Node, value: torch.SymInt, before: fx.Node) -> fx.Node:
        """The length, or what arithmetic makes of it, for what is left."""
        if value.node.expr == self.tokens:
            return self._insert(before, "size", self.rows, 1)
        operands = source.args if source.op == "call_function" and not source.kwargs else ()
        values = [fake(operand) if isinstance(operand, fx.Node) else operand for operand in operands]
        if values and all(isinstance(value, int | torch.SymInt) for value in values):
            left = fx.node.map_arg(operands, lambda size: self._size_of_left(size, fake(size), before))
            found = self._insert(before, source.target, *left)
            if self._same_size(value, fake(found)):
                return found
        raise CannotShorten(f"{source.name} is computed from the length")

    def _take(self, source: fx.Node, before: fx.Node) -> fx.Node:
        """``source`` at the positions that are left, in every dimension that is the sequence."""
        dims = self._dims(source, self.tokens)
        taken = source
        first = str((shape(taken) or ())[0])
        if not self.alone and (first != str(self.batch) or 0 in dims):
            if first != "1":
                raise CannotShorten(f"{source.name} has no batch dimension")
            rank = fake(taken).dim()
            batch = self._insert(before, "size", self.rows, 0)
            taken = self._insert(before, "expand", taken, batch, *([-1] * (rank - 1)))
        for dim in dims:
            if self.alone:
                taken = self._insert(before, torch.index_select, taken, dim, self._row(before))
            else:
                taken = self._insert(before, torch.gather, taken, dim, self._index(taken, dim, before))
        return taken

    def _row(self, before: fx.Node) -> fx.Node:
        """The positions of the only batch row."""
        return self._insert(before, operator.getitem, self.rows, 0)

    def _index(self, node: fx.Node, dim: int, before: fx.Node) -> fx.Node:
        """`rows` as an index into dimension ``dim`` of ``node``, whose first dimension is the batch."""
        rank = fake(node).dim()
        view = tuple(slice(None) if d in (0, dim) else None for d in range(rank))
        index = self._insert(before, operator.getitem, self.rows, view)
        sizes = [-1 if d in (0, dim) else self._size(node, d, before) for d in range(rank)]
        return self._insert(before, "expand", index, *sizes)

    def _size(self, node: fx.Node, dim: int, before: fx.Node) -> int | fx.Node:
        size = (shape(node) or ())[dim]
        return size if isinstance(size, int) else self._insert(before, "size", node, dim)

    def _insert(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with fake(self.cut).fake_mode:  # sizes alone do not say that they are fake
            node = insert_call(before, target, *args, **kwargs)
        self._inserted.append(node)
        return node

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def _has_tokens(self, value: Any) -> bool:
        """Whether a size of ``value`` depends on the length; strides may."""
        sizes = (s for x in _sized(value) for s in (x.shape if isinstance(x, torch.Tensor) else (x,)))
        return any(self.tokens in free_symbols(size) for size in sizes)

    def _dims(self, node: fx.Node, length: Any) -> list[int]:
        """Dimensions of ``node`` that are the sequence, of ``length``."""
        for size in shape(node) or ():
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            if expression is not None and expression != length and length in expression.free_symbols:
                raise CannotShorten(f"{node.name} has a dimension of {expression}")
        return _dims_of(node, length)


def tail_of(cut: fx.Node) -> int:
    """How many positions at the end of the sequence what depends on ``cut`` reads by their place; 1 at least.

    ``cut`` is ``[batch, tokens, ...]`` with a symbolic length.
    """
    tokens = (shape(cut) or ())[1].node.expr
    return max((tail for node in _depending(cut) if (tail := _tail(node, tokens)) is not None), default=1)


def _tail(node: fx.Node, tokens: Any) -> int | None:
    """How far from the end of the sequence ``node`` reads; ``None``: it is no slice there."""
    source = node.args[0] if node.args else None
    if op(node) != "getitem" or not isinstance(source, fx.Node):
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    dims = _dims_of(source, tokens)
    if any(part is Ellipsis or part is None for part in index) or len(dims) != 1 or dims[0] >= len(index):
        return None
    part = index[dims[0]]
    if isinstance(part, slice) and part.stop is None and part.step in (None, 1):
        part = part.start
    part = fake(part) if isinstance(part, fx.Node) else part
    part = part.node.maybe_as_int() if isinstance(part, torch.SymInt) else part
    return -part if isinstance(part, int) and part < 0 else None


def _dims_of(node: fx.Node, length: Any) -> list[int]:
    sizes = enumerate(shape(node) or ())
    return [dim for dim, size in sizes if isinstance(size, torch.SymInt) and size.node.expr == length]


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _span(part: Any, named: Any) -> int:
    """How many dimensions a part of an index stands for; an ellipsis: none by itself."""
    return named.dim() if _is_mask(named) else int(part is not Ellipsis)


def _depending(cut: fx.Node) -> Iterator[fx.Node]:
    """Everything that depends on ``cut``, in order, but for the output."""
    depends = {cut}
    node = cut.next
    while node.op not in ("root", "output"):
        if not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            yield node
        node = node.next


def _written_behind(cut: fx.Node, depending: list[fx.Node]) -> frozenset[Any]:
    """Where anything but ``depending`` is written behind ``cut``: what is taken from there may be out of date."""
    own, node = set(depending), cut.next
    written: set[Any] = set()
    while node.op != "root":
        for target in mutated_inputs(node):
            if target not in own:
                written |= places(target)
        node = node.next
    return frozenset(written)


def _sized(value: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor | torch.SymInt)]
