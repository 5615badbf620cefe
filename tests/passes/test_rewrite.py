"""Writing to graphs: dead code by the liveness of buffers, inserted calls, inlined lowerings."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from avl_fx.passes.nodes import fake, shape
from avl_fx.passes.rewrite import insert_call, insert_traced, remove_dead
from tests.passes._graphs import capture, counts, find_node

ROWS = torch.arange(12.0).reshape(4, 3)


def graph_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    return capture(function, *args, **kwargs).gm


def output_of(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "output")


def placeholder(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "placeholder" and n.name == f"l_{name}_")


def returns(gm: fx.GraphModule, *nodes: fx.Node) -> None:
    """Let the graph return ``nodes`` and nothing else: what a rewrite does to the rest."""
    output_of(gm).args = (tuple(nodes),)


def clean(
    gm: fx.GraphModule,
    unused: Collection[fx.Node] = (),
    removable: Collection[fx.Node] = (),
    keep: Collection[fx.Node] = (),
) -> list[str]:
    dropped = remove_dead(gm.graph, unused, removable, keep)
    gm.graph.lint()
    return dropped


# ---- remove_dead ----------------------------------------------------------------------------------------------------


def test_a_live_graph_stays() -> None:
    gm = graph_of(lambda x: (x + 1) * 2, ROWS)
    before = len(gm.graph.nodes)
    assert clean(gm) == []
    assert len(gm.graph.nodes) == before


def test_what_nothing_uses_goes() -> None:
    gm = graph_of(lambda x: ((x + 1) * 2).relu(), ROWS)
    returns(gm, placeholder(gm, "x"))
    clean(gm)
    assert not counts(gm)
    assert placeholder(gm, "x"), "inputs stay: their positions are fixed"


def test_a_write_to_an_input_lives() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x.copy_(y * 2)
        return y + 1

    gm = graph_of(function, ROWS.clone(), ROWS.clone())
    returns(gm, placeholder(gm, "y"))
    assert clean(gm) == []
    assert counts(gm) == {"mul": 1, "copy_": 1}, "the write lives, and what it writes"


@pytest.mark.parametrize("through", ["slice", "transpose", "select", "mT"])
def test_a_write_to_a_view_of_an_input_lives(through: str) -> None:
    views = {
        "slice": lambda x: x[1:],
        "transpose": lambda x: x.transpose(0, 1),
        "select": lambda x: x.select(0, 1),
        "mT": lambda x: x.mT,
    }

    def function(x: Tensor, y: Tensor) -> Tensor:
        views[through](x).add_(1.0)
        return y + 1

    gm = graph_of(function, ROWS.clone(), ROWS.clone())
    returns(gm, placeholder(gm, "y"))
    assert clean(gm) == []
    assert counts(gm)["add_"] == 1


def test_a_write_through_a_view_that_no_name_tells_of_lives() -> None:
    """Fake tensors know which nodes share memory, whatever made them."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        buffer = x * 1.0
        same, _ = torch.broadcast_tensors(buffer, y)
        same[0].mul_(3.0)
        return buffer

    gm = graph_of(function, ROWS.clone(), ROWS.clone())
    assert clean(gm) == []
    assert counts(gm)["mul_"] == 1


def written_intermediate(x: Tensor) -> Tensor:
    buffer = x.clone()
    buffer[0] = 7.0
    return buffer.sum() + x.sum()


def test_a_write_to_an_intermediate_that_is_read_later_lives() -> None:
    gm = graph_of(written_intermediate, ROWS)
    assert clean(gm) == []
    assert counts(gm)["setitem"] == 1


def test_a_write_to_an_intermediate_that_nothing_reads_dies() -> None:
    gm = graph_of(written_intermediate, ROWS)
    returns(gm, find_node(gm, "sum", 1))
    assert clean(gm) == ["setitem"]
    assert counts(gm) == {"sum": 1}


def test_a_write_that_is_read_through_a_view_lives() -> None:
    def function(x: Tensor) -> Tensor:
        buffer = x.clone()
        row = buffer[1]
        buffer.mul_(3.0)
        return row.sum()

    gm = graph_of(function, ROWS)
    assert clean(gm) == []
    assert counts(gm)["mul_"] == 1


@pytest.mark.parametrize("as_index", [True, False], ids=["index", "source"])
def test_a_write_that_advanced_indexing_reads_lives(as_index: bool) -> None:
    """As mixtures of experts put their rows back: `order[permutation] = arange`, then `rows[order]`."""

    def scattered(permutation: Tensor, rows: Tensor) -> Tensor:
        order = torch.empty_like(permutation)
        order[permutation] = torch.arange(len(permutation))
        return rows[order] if as_index else order[permutation] * rows[:, 0]

    inputs = (torch.tensor([2, 0, 3, 1]), ROWS)
    gm = graph_of(scattered, *inputs)
    writes = counts(gm)["setitem"]
    assert clean(gm) == []
    assert counts(gm)["setitem"] == writes == 1
    assert torch.equal(gm(*inputs)[0], scattered(*inputs))


def test_reading_the_shape_of_a_buffer_does_not_keep_its_writes() -> None:
    def function(x: Tensor) -> Tensor:
        buffer = x.clone()
        buffer[0] = 7.0
        return x.view(buffer.size())

    gm = graph_of(function, ROWS, dynamic=True)
    assert counts(gm)["size"] == 1
    assert clean(gm) == ["setitem"]
    assert counts(gm)["clone"] == 1


def test_a_chain_of_writes_lives_or_dies_together() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        buffer = x.clone()
        buffer.add_(1.0).mul_(2.0)
        other = x.clone()
        other.copy_(buffer)
        return other.sum(), x.sum()

    gm = graph_of(function, ROWS)
    assert clean(gm) == []
    returns(gm, find_node(gm, "sum", 1))
    assert clean(gm) == ["add_", "mul_", "copy_"], "in program order"
    assert counts(gm) == {"sum": 1}


def cached(key: Tensor, cache: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """One layer of a static cache: write the keys, read them, and something else."""
    cache[:2] = key * 2
    return cache.sum(), x + 1


def test_writes_to_a_removable_buffer_die_with_its_last_reader() -> None:
    gm = graph_of(cached, ROWS[:2], ROWS.clone(), ROWS.clone())
    cache = placeholder(gm, "cache")
    assert clean(gm, removable=[cache]) == [], "a live node reads the buffer"
    returns(gm, find_node(gm, "add"))
    assert clean(gm, removable=[cache]) == ["setitem"]
    assert counts(gm) == {"add": 1}, "and what fed the write goes with it"


def test_writes_to_an_input_that_is_not_removable_stay() -> None:
    gm = graph_of(cached, ROWS[:2], ROWS.clone(), ROWS.clone())
    returns(gm, find_node(gm, "add"))
    assert clean(gm, removable=[placeholder(gm, "key")]) == []


def test_that_a_removable_buffer_is_returned_does_not_keep_its_writes() -> None:
    """The model returns its cache; its elements are what the rewrite gave up."""

    def function(key: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        cache = torch.zeros(4, 3)
        cache[:2] = key * 2
        return cache, x + 1

    gm = graph_of(function, ROWS[:2], ROWS.clone())
    buffer = find_node(gm, "zeros")
    assert clean(gm) == []
    assert clean(gm, removable=[buffer]) == ["setitem"]
    assert buffer in output_of(gm).args[0]  # type: ignore[operator]


def test_nodes_that_never_had_users_stay() -> None:
    """Dynamo kept them for their effects."""

    def function(x: Tensor) -> Tensor:
        torch._check(x.shape[0] == 4)
        x.cos()
        return x + 1

    gm = graph_of(function, ROWS)
    unused = [n for n in gm.graph.nodes if not n.users and n.op != "output"]
    assert unused
    clean(gm, unused)
    assert all(n in gm.graph.nodes for n in unused)


def test_nodes_that_a_later_stage_needs_stay() -> None:
    gm = graph_of(lambda x: ((x > 1), x + 1), ROWS)
    mask = find_node(gm, "gt")
    returns(gm, find_node(gm, "add"))
    clean(gm, keep=[mask])
    assert mask in gm.graph.nodes
    clean(gm)
    assert mask not in list(gm.graph.nodes)


def test_a_custom_operator_lives_when_either_of_its_buffers_does() -> None:
    from tests.passes.test_nodes import store  # registers the operator

    def function(new: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        store(new, keys, values)
        return values.sum()

    gm = graph_of(function, torch.ones(2, 1), torch.zeros(2, 3), torch.zeros(2, 3))
    assert clean(gm, removable=[placeholder(gm, "keys")]) == []
    assert counts(gm)["store"] == 1


# ---- insert_call ----------------------------------------------------------------------------------------------------


def test_new_nodes_carry_their_fake_value_and_their_origin() -> None:
    class Inner(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    gm = graph_of(torch.nn.Sequential(Inner()), ROWS)
    relu = find_node(gm, "relu")
    node = insert_call(relu, torch.add, relu.args[0], 1.0)
    assert shape(node) == (4, 3)
    assert fake(node).dtype == torch.float32
    assert node.meta["nn_module_stack"] == relu.meta["nn_module_stack"]
    assert node.next is relu


def test_methods_go_by_name() -> None:
    gm = graph_of(lambda x: x.relu(), ROWS)
    node = insert_call(find_node(gm, "relu"), "transpose", placeholder(gm, "x"), 0, 1)
    assert node.op == "call_method"
    assert shape(node) == (3, 4)


def test_nodes_inside_slices_lists_and_keywords_have_fake_values_too() -> None:
    def function(x: Tensor) -> Tensor:
        return x[: x.size(0) - 1] + 1

    gm = graph_of(function, ROWS, dynamic=True)
    add = find_node(gm, "add")
    length = find_node(gm, "getitem").args[1].stop  # type: ignore[union-attr]
    assert isinstance(length, fx.Node)
    cut = insert_call(add, operator.getitem, placeholder(gm, "x"), slice(None, length))
    assert str(shape(cut)) == str(shape(add))
    joined = insert_call(add, torch.cat, [cut, cut], dim=1)
    assert shape(joined)[1:] == (6,)  # type: ignore[index]


def test_inserting_adds_no_guard() -> None:
    gm = graph_of(lambda x: x.relu() + 1, ROWS, dynamic=True)
    env = fake(placeholder(gm, "x")).fake_mode.shape_env
    before = len(env.guards)
    relu = find_node(gm, "relu")
    insert_call(find_node(gm, "add"), torch.matmul, relu, insert_call(find_node(gm, "add"), "transpose", relu, 0, 1))
    assert len(env.guards) == before


# ---- insert_traced --------------------------------------------------------------------------------------------------


def test_a_function_is_inlined_node_by_node() -> None:
    def lowering(x: Tensor, y: Tensor | None, factor: float) -> Tensor:
        assert y is None
        rows, columns = x.shape
        halves = x[:, : columns // 3].expand(rows, columns)
        return F.softmax(halves.mul(factor).to(x.dtype), dim=-1).unflatten(0, (2, 2)).flatten(0, 1)

    gm = graph_of(lambda x: x.relu(), ROWS)
    relu = find_node(gm, "relu")
    node = insert_traced(relu, lowering, placeholder(gm, "x"), None, 0.5)
    relu.replace_all_uses_with(node)
    clean(gm)
    gm.recompile()
    torch.testing.assert_close(gm(ROWS)[0], lowering(ROWS, None, 0.5))
    assert all("example_value" in n.meta for n in gm.graph.nodes if n.op != "output")
    names = counts(gm)
    assert (names["softmax"], names["mul"], names["flatten"]) == (1, 1, 1)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lowerings_inline_into_graphs_of_symbolic_sizes(device: str, masked: bool, queries: int) -> None:
    from avl_fx.kernels.attention import LOWERINGS

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return torch.ops.avl.attention(query, key, value, mask, 0.3, False, 0)

    query = torch.randn(2, 4, queries, 8)
    key, value = torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.randn(2, 1, queries, 7) if masked else None
    marks = (
        [(0, 0), (1, 0), (2, 0), (1, 2), (2, 2)]
        + ([(3, 0), (3, 3)] if masked else [])
        + ([(0, 2)] if queries > 1 else [])
    )
    gm = graph_of(attend, query, key, value, mask, mark=marks)
    node = find_node(gm, "attention")
    lowered = insert_traced(node, LOWERINGS[device], *node.args[:6])
    node.replace_all_uses_with(lowered)
    clean(gm)
    gm.recompile()
    assert not any(isinstance(a, torch.SymInt) for n in gm.graph.nodes for a in torch.utils._pytree.tree_leaves(n.args))
    inputs = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
    given = {"l_query_": query, "l_key_": key, "l_value_": value, "l_mask_": mask}
    sizes = [given.get(name, 2) for name in inputs]
    torch.testing.assert_close(gm(*sizes)[0], attend(query, key, value, mask), atol=1e-5, rtol=1e-5)
