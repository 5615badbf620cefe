"""Reading FX nodes of a Dynamo graph: one name per operator, shapes, aliases and in-place writes.

Dynamo writes the same operator as a function, a method or an operator (`torch.add`, `x.add`, `x + y`), so the passes
ask for *names*, never for targets.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = [
    "METADATA_OPS",
    "VIEW_OPS",
    "alias_root",
    "aliases",
    "arg",
    "const",
    "fake",
    "hint",
    "loses_gradient",
    "mutated_input",
    "mutated_inputs",
    "mutations",
    "number",
    "op",
    "operator_call",
    "places",
    "same_shape",
    "same_size",
    "shape",
    "tensor_inputs",
    "where_args",
    "with_views",
    "writes_to",
    "written_between",
]

_FUNCTION_NAMES: dict[Any, str] = {
    operator.getitem: "getitem",
    operator.setitem: "setitem",
    operator.add: "add",
    operator.iadd: "add_",
    operator.sub: "sub",
    operator.isub: "sub_",
    operator.mul: "mul",
    operator.imul: "mul_",
    operator.truediv: "div",
    operator.itruediv: "div_",
    operator.matmul: "matmul",
    operator.neg: "neg",
    operator.invert: "bitwise_not",
    # By their own names these would look like methods that write.
    operator.and_: "bitwise_and",
    operator.or_: "bitwise_or",
    operator.not_: "logical_not",
    operator.is_: "is",
    operator.iand: "bitwise_and_",
    operator.ior: "bitwise_or_",
    operator.ixor: "bitwise_xor_",
    operator.ifloordiv: "floor_divide_",
    operator.imod: "remainder_",
    operator.ipow: "pow_",
    torch.nn.functional.scaled_dot_product_attention: "scaled_dot_product_attention",
    torch.nn.functional.softmax: "softmax",
    torch.nn.functional.dropout: "dropout",
    torch.nn.functional.linear: "linear",
    torch.true_divide: "div",
    torch.divide: "div",
    torch.multiply: "mul",
    torch.concat: "cat",
    torch.concatenate: "cat",
    torch.swapaxes: "transpose",
    torch.swapdims: "transpose",
    torch.special.softmax: "softmax",
}
_METHOD_NAMES = {
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "__getitem__": "getitem",
    "__eq__": "eq",  # what `x == 1` is in older releases of torch
    "__ne__": "ne",
}
# Dynamo writes these attributes as `getattr(x, "mT")`.
_ATTRIBUTE_VIEWS = frozenset({"T", "H", "mT", "mH", "real", "imag"})

VIEW_OPS = frozenset(
    {"getitem", "view", "view_as", "reshape", "transpose", "permute", "expand", "expand_as", "unsqueeze", "squeeze"}
    | {"flatten", "unflatten", "ravel", "narrow", "select", "diagonal", "unfold", "as_strided", "contiguous", "detach"}
    | {"movedim", "moveaxis", "t", "adjoint", "view_as_real", "view_as_complex", "reshape_as", "broadcast_to", "alias"}
    | {"split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "chunk", "unbind", "swapaxes"}
    | {"to", "type", "type_as", "float", "half", "bfloat16", "double", "cpu", "cuda", "_get_data_attr"}
    | {"from_local", "to_local", "redistribute", "full_tensor"}  # between a process's part and a DTensor
    | {"dropout", "positive", "conj", "resolve_conj", "resolve_neg"}
    | _ATTRIBUTE_VIEWS
)
"""May return an alias of their first argument. Ops that sometimes copy count as aliases: that is the safe side."""

METADATA_OPS = frozenset(
    {"size", "numel", "dim", "stride", "shape", "ndimension", "is_contiguous", "storage_offset", "element_size"}
)
"""Read a tensor's description and never its elements."""

_INPLACE_EXEMPT = frozenset({"requires_grad_", "__getitem__", "and_", "or_", "not_", "is_"})
"""Names with a trailing underscore that write nothing; Python's operator module spells its keywords so."""


def op(node: Any) -> str:
    """Name of the operator that ``node`` applies, or ``""`` for placeholders, outputs and non-nodes."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_method":
        return _METHOD_NAMES.get(str(node.target), str(node.target))
    if node.op == "call_function":
        if node.target is getattr and node.args[1] in _ATTRIBUTE_VIEWS:
            return str(node.args[1])
        return _function(node.target).name
    return ""


class _Function(NamedTuple):
    """What the target of a ``call_function`` node says about the call. Passes ask for it a hundred thousand times a
    graph, of a few dozen targets."""

    name: str
    written: tuple[tuple[int, str], ...]
    """Arguments that are written in place, by position and name."""
    switch: int | None = None
    """Position of the argument ``inplace``: where it is true, the first one is written."""


_FIRST = ((0, ""),)
_OUT = ((sys.maxsize, "out"),)
"""Of functions without a schema: by name alone."""


def _function(target: Any) -> _Function:
    try:
        return _known_function(target)
    except TypeError:  # cannot be hashed
        return _describe(target, None)


@lru_cache(maxsize=1024)
def _known_function(target: Any) -> _Function:
    return _describe(target, _FUNCTION_NAMES.get(target))


def _describe(target: Any, known: str | None) -> _Function:
    overload = _overload(target)
    if overload is not None:
        name = overload._schema.name.split("::")[-1] if known is None else known
        arguments = enumerate(overload._schema.arguments)
        return _Function(name, tuple((i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write))
    name = getattr(target, "__name__", str(target)) if known is None else known
    # `torch._foreach_mul_` writes; other names that start so (`_operator`) are of modules.
    own_name = not name.startswith("_") or name.startswith("_foreach_")
    if name == "setitem" or (name.endswith("_") and not name.endswith("__") and own_name):
        return _Function(name, _FIRST)
    return _Function(name, _OUT, _position_of(target, "inplace"))


def _position_of(function: Any, parameter: str) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not written in Python
        return None
    return names.index(parameter) if parameter in names else None


def _overload(target: Any) -> torch._ops.OpOverload | None:
    """The operator overload that is called; Dynamo writes the packet where the model does."""
    if isinstance(target, torch._ops.OpOverloadPacket) and len(target.overloads()) == 1:
        return getattr(target, target.overloads()[0])
    return target if isinstance(target, torch._ops.OpOverload) else None


def operator_call(node: fx.Node) -> tuple[str, dict[str, Any]] | None:
    """``library::operator`` and the arguments by name, where ``node`` calls an operator that has a schema."""
    overload = _overload(node.target) if node.op == "call_function" else None
    if overload is None:
        return None
    names = [argument.name for argument in overload._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return overload._schema.name, {name: given[name] for name in names if name in given}


def fake(node: Any) -> Any:
    """The fake value Dynamo recorded for ``node`` (``None`` where there is none)."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def shape(node: Any) -> tuple[Any, ...] | None:
    """Shape of the tensor that ``node`` makes, ints and SymInts; ``None`` for anything else."""
    value = fake(node)
    return tuple(map(_known, value.shape)) if isinstance(value, torch.Tensor) else None


def _known(size: Any) -> Any:
    """An int for a SymInt that earlier guards have fixed."""
    fixed = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if fixed is None else fixed


def hint(size: Any) -> int | None:
    """A size as it was when the graph was captured; adds no guard where it is symbolic, ``None`` where it depends on
    data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else None


def same_size(a: Any, b: Any) -> bool:
    """Equal without asking the shape environment for a new guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two nodes make tensors of one shape; no guard either."""
    left, right = shape(a), shape(b)
    if left is None or right is None or len(left) != len(right):
        return False
    return all(map(same_size, left, right))


def arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Argument of a call whether it was passed by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def where_args(node: fx.Node) -> tuple[Any, Any, Any]:
    """Condition, value where it holds, value elsewhere. The method, ``x.where(condition, y)``, starts with a value."""
    if node.op == "call_method":
        return arg(node, 1, "condition"), node.args[0], arg(node, 2, "other")
    return arg(node, 0, "condition"), arg(node, 1, "input"), arg(node, 2, "other")


def const(value: Any) -> float | None:
    """A Python number held by ``value``; ``None`` when it is a node, a SymInt or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def number(value: Any) -> float | None:
    """`const`, and the value of a Python float that Dynamo made symbolic.

    With ``dynamic=True`` the float attributes of modules (a model's ``self.scaling``) come as inputs of the graph.
    Reading one installs a guard on its value; an expression over sizes is never read, it would fix those sizes.
    """
    known = const(value)
    if known is None and op(value) == "item" and value.args[0].op == "placeholder":
        symbolic = fake(value)
        if isinstance(symbolic, torch.SymFloat) and symbolic.node.has_hint():
            return float(symbolic)
    return known


def tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """Input nodes of ``node`` that make tensors, lists looked into."""
    return (n for n in node.all_input_nodes if isinstance(fake(n), torch.Tensor))


def mutated_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that ``node`` writes to in place.

    Covers ``x.op_(...)``, ``x[...] = y``, functions with ``out=`` or ``inplace=True``, lists of tensors, custom
    operators whose schema says so, and Triton kernels of the model's own (all that they are given).
    """
    written: list[Any] = []
    if node.op == "call_method":
        name = str(node.target)
        inplace = name.endswith("_") and not name.endswith("__") and name not in _INPLACE_EXEMPT
        written = [node.args[0]] if inplace or name == "__setitem__" else []
    elif node.op == "call_function":
        name, arguments, switch = _function(node.target)
        if switch is not None and arg(node, switch, "inplace"):
            arguments = (*arguments, (0, "input"))
        elif name == "triton_kernel_wrapper_mutation":
            return tuple(tensor_inputs(node))
        elif not arguments or (arguments is _OUT and "out" not in node.kwargs):
            return ()
        written = [arg(node, position, name) for position, name in arguments]
    several = (target if isinstance(target, list | tuple) else (target,) for target in written)
    return tuple(target for targets in several for target in targets if isinstance(target, fx.Node))


def mutated_input(node: fx.Node) -> fx.Node | None:
    """The first tensor that ``node`` writes to in place, or ``None``."""
    written = mutated_inputs(node)
    return written[0] if written else None


def mutations(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """All in-place writes, in program order."""
    return [n for n in nodes if mutated_input(n) is not None]


def _views(node: fx.Node) -> Iterator[fx.Node]:
    return (user for user in node.users if op(user) in VIEW_OPS and arg(user, 0, "input") is node)


def with_views(node: fx.Node) -> dict[fx.Node, None]:
    """``node``, its views and theirs, in the order in which they are found."""
    found, pending = {node: None}, [node]
    while pending:
        new = [view for view in _views(pending.pop()) if view not in found]
        found.update(dict.fromkeys(new))
        pending += new
    return found


def alias_root(node: fx.Node) -> fx.Node:
    """The node whose storage ``node`` may share: views and results of in-place ops walked back."""
    seen = node
    while True:
        target = mutated_input(seen)
        if target is not None:
            seen = target
        elif op(seen) in VIEW_OPS and isinstance(source := arg(seen, 0, "input"), fx.Node):
            seen = source
        else:
            return seen


def aliases(root: fx.Node) -> list[fx.Node]:
    """``root``, its views and the results of in-place writes to it."""
    found, pending, seen = [root], [root], {root}
    while pending:
        current = pending.pop()
        written = (user for user in current.users if current in mutated_inputs(user))
        for user in (*_views(current), *written):
            if user not in seen:
                seen.add(user)
                found.append(user)
                pending.append(user)
    return found


def writes_to(root: fx.Node) -> list[fx.Node]:
    """In-place writes to the storage of ``root``, also through views."""
    return [n for n in aliases(root) if any(alias_root(target) is root for target in mutated_inputs(n))]


def written_between(tensor: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether an in-place write to the storage of ``tensor`` stands from ``first`` to before ``last``.

    Names say which nodes may share memory, and fake tensors which do: either is enough.
    """
    read, node = places(tensor), first
    while node is not last and node.op != "root":
        if any(places(target) & read for target in mutated_inputs(node)):
            return True
        node = node.next
    return False


def places(node: fx.Node) -> frozenset[fx.Node | StorageWeakRef]:
    """Where the elements of ``node`` may lie: two nodes that have a place in common may share memory.

    Names of operators say which nodes may (`alias_root`), and fake tensors which do: either is enough.
    """
    value, root = fake(node), alias_root(node)
    try:
        memory = StorageWeakRef(value.untyped_storage()) if isinstance(value, torch.Tensor) else None
    except NotImplementedError:  # a tensor without storage, such as a sparse one
        memory = None
    return frozenset({root} if memory is None else {root, memory})


def loses_gradient(node: fx.Node) -> bool:
    """Whether ``node`` ran without gradients though one of its inputs asks for them."""
    value = fake(node)
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return False
    if not any(fake(source).requires_grad for source in tensor_inputs(node)):
        return False
    return not value.requires_grad or not _grad_mode(node)  # fake views do not tell


def _grad_mode(node: fx.Node) -> bool:
    while node.op != "root":
        node = node.prev
        if op(node) == "_set_grad_enabled":
            return bool(node.args[0])
    return True
