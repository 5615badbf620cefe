"""Writing to a Dynamo graph: new nodes that carry their fake value, and dead code that a rewrite left behind."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from avl_fx.passes.nodes import METADATA_OPS, VIEW_OPS, arg, fake, mutated_inputs, op, places, shape

__all__ = ["add_input", "insert_call", "insert_traced", "remove_dead"]


_COPIED = ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id")
"""What a new node takes from the one in front of which it stands: where it is, and whether it is checkpointed."""


def insert_call(before: fx.Node, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert ``target(*args, **kwargs)`` before ``before`` with its fake value recorded.

    A string names a tensor method. Every new node needs ``meta["example_value"]``: Inductor's caches are bypassed, and
    the verifier fails, without it.
    """
    graph = before.graph
    with graph.inserting_before(before):
        if isinstance(target, str):
            node = graph.call_method(target, args, kwargs)
        else:
            node = graph.call_function(target, args, kwargs)
    for key in _COPIED:
        if key in before.meta:
            node.meta[key] = before.meta[key]
    # Not pytree: nodes may stand in slices.
    fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), fake)
    with _fake_mode_of(fake_args, fake_kwargs):
        if isinstance(target, str):
            node.meta["example_value"] = getattr(fake_args[0], target)(*fake_args[1:], **fake_kwargs)
        else:
            node.meta["example_value"] = target(*fake_args, **fake_kwargs)
    return node


def _fake_mode_of(*trees: Any) -> contextlib.AbstractContextManager[Any]:
    for leaf in pytree.tree_leaves(trees):
        mode = getattr(leaf, "fake_mode", None)
        if mode is not None:
            return mode
    return contextlib.nullcontext()


def add_input(graph: fx.Graph, name: str, sizes: tuple[Any, ...], dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """Append an input of ``sizes`` and ``dtype`` to the graph's, on the device of ``like``."""
    after = [n for n in graph.nodes if n.op == "placeholder"][-1].next
    with graph.inserting_before(after):
        node = graph.placeholder(name)
    model = fake(like)
    with _fake_mode_of(model):
        node.meta["example_value"] = torch.empty(sizes, dtype=dtype, device=model.device)
    return node


class _Value:
    """Stands for a node inside a lowering: tensor functions on it insert nodes, shapes read the fake value."""

    def __init__(self, node: fx.Node, before: fx.Node) -> None:
        self._node, self._before = node, before

    @property
    def shape(self) -> tuple[Any, ...]:
        return shape(self._node) or ()

    @property
    def dtype(self) -> torch.dtype:
        return fake(self._node).dtype

    def dim(self) -> int:
        return fake(self._node).dim()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = next(leaf._before for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, cls))
        node_args, node_kwargs = pytree.tree_map(_unwrap, (args, kwargs or {}))
        return cls(insert_call(before, func, *node_args, **node_kwargs), before)

    def __getitem__(self, index: Any) -> _Value:
        return _Value(insert_call(self._before, operator.getitem, self._node, index), self._before)

    def __getattr__(self, name: str) -> Callable[..., _Value]:
        def call(*args: Any, **kwargs: Any) -> _Value:
            node_args, node_kwargs = pytree.tree_map(_unwrap, (args, kwargs))
            return _Value(insert_call(self._before, name, self._node, *node_args, **node_kwargs), self._before)

        return call


def _unwrap(value: Any) -> Any:
    return value._node if isinstance(value, _Value) else value


def insert_traced(before: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
    """Insert what ``function`` does to its arguments, node by node, before ``before``.

    Lowerings are written as plain PyTorch functions on tensors, and tested as such; this inlines one into the graph so
    that Inductor sees its operators. Only tensor methods, ``shape``, ``dtype``, ``dim()`` and functions with
    ``__torch_function__`` may be used on the arguments.
    """
    values = [_Value(a, before) if isinstance(a, fx.Node) else a for a in args]
    result = function(*values)
    return result._node


def remove_dead(
    graph: fx.Graph,
    initially_unused: Collection[fx.Node],
    removable: Collection[fx.Node] = (),
    keep: Collection[fx.Node] = (),
) -> list[str]:
    """Remove what a rewrite left unused, and writes to ``removable`` buffers that nothing reads any more.

    FX's own elimination either keeps every in-place write or drops live ones; here a write lives as long as its buffer
    is observable.

    Args:
        graph: a Dynamo graph.
        initially_unused: nodes that had no users *before* the rewrite. They were kept by Dynamo for their effects
            (guards, in-place writes, logging) and stay.
        removable: buffers whose writes may go when nothing else in the graph reads their elements: the static key
            caches of lazy layers.
        keep: nodes that a later stage will use.

    Returns:
        Names of the in-place writes that were removed, in program order.
    """
    nodes = list(graph.nodes)
    writes = {n: frozenset().union(*map(places, mutated_inputs(n))) for n in nodes if mutated_inputs(n)}
    given_up = frozenset().union(*map(places, removable))
    inputs = [n for n in nodes if n.op in ("placeholder", "get_attr")] if writes else []
    outside = frozenset().union(*map(places, inputs)) - given_up

    live: set[fx.Node] = set()
    pending: list[fx.Node] = []

    def mark(node: fx.Node) -> None:
        if node not in live:
            live.add(node)
            pending.append(node)

    for node in nodes:
        if node.op in ("placeholder", "output"):
            live.add(node)
        if node.op == "output":
            pending.append(node)
        elif node in writes:
            if writes[node] & outside:
                mark(node)
        elif node in initially_unused or node in keep:
            mark(node)

    while True:
        while pending:
            for used in pending.pop().all_input_nodes:
                mark(used)
        # A write to a buffer made in the graph, or to a removable one, lives when a live node reads that buffer. That a
        # removable buffer is returned does not count: its elements are what the rewrite gave up.
        waiting = [node for node in writes if node not in live]
        read: set[Any] = set()
        for node in live if waiting else ():
            read.update(*(places(source) - (given_up if node.op == "output" else set()) for source in _reads(node)))
        for node in waiting:
            if writes[node] & read:
                mark(node)
        if not pending:
            break

    dropped = []
    for node in reversed(nodes):
        if node not in live:
            if node in writes:
                dropped.append(node.name)
            graph.erase_node(node)
    return dropped[::-1]


def _reads(node: fx.Node) -> list[fx.Node]:
    """The inputs that ``node`` reads elements of: none for metadata, nor for a view, which may itself be unread.

    A copy of what is looked up (`rows[order]`) passes for a view of its source here; what it is looked up by is read.
    """
    if node.op == "output" or op(node) not in METADATA_OPS | VIEW_OPS:
        return node.all_input_nodes
    source = arg(node, 0, "input")
    return [used for used in node.all_input_nodes if used is not source]
