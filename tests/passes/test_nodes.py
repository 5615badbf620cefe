"""Reading Dynamo graphs: names of operators, aliases, in-place writes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avl_fx.passes.nodes import alias_root, const, mutated_inputs, number, op, shape, written_between
from avl_fx.passes.site import PassResult
from tests.passes._graphs import capture, find_node, rewrite


@torch.library.custom_op("avl_tests::store", mutates_args={"keys", "values"})
def store(new: Tensor, keys: Tensor, values: Tensor) -> None:
    """A cache update that writes to two buffers at once."""
    keys[:, : new.shape[1]] = new
    values[:, : new.shape[1]] = new


@store.register_fake
def _(new: Tensor, keys: Tensor, values: Tensor) -> None:
    return None


def last(function: Callable[..., Any], *args: Any) -> Any:
    """The node that makes the (first) output of ``function``."""
    gm = capture(function, *args).gm
    return next(n for n in gm.graph.nodes if n.op == "output").args[0][0]


SQUARE = torch.arange(16.0).reshape(2, 2, 2, 2)
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "mT": lambda x: x.mT,
    "mH": lambda x: x.mH,
    "transpose": lambda x: x.transpose(1, 2),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "permute": lambda x: x.permute(0, 2, 1, 3),
    "movedim": lambda x: torch.movedim(x, 1, 2),
    "moveaxis": lambda x: x.moveaxis(1, 2),
    "view": lambda x: x.view(4, 4),
    "reshape": lambda x: x.reshape(4, 4),
    "reshape_as": lambda x: x.reshape_as(torch.empty(4, 4)),
    "view_as": lambda x: x.view_as(torch.empty(4, 4)),
    "flatten": lambda x: x.flatten(1),
    "ravel": lambda x: x.ravel(),
    "unflatten": lambda x: x.unflatten(0, (1, 2)),
    "expand": lambda x: x.expand(2, 2, 2, 2),
    "expand_as": lambda x: x.expand_as(x),
    "broadcast_to": lambda x: torch.broadcast_to(x, (2, 2, 2, 2)),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x[:1].squeeze(0),
    "select": lambda x: x.select(0, 1),
    "narrow": lambda x: x.narrow(0, 0, 1),
    "slice": lambda x: x[:, :1],
    "index": lambda x: x[0],
    "diagonal": lambda x: x.diagonal(),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 2)),
    "unfold": lambda x: x.unfold(0, 2, 1),
    "split": lambda x: x.split(1, dim=0)[1],
    "tensor_split": lambda x: x.tensor_split(2)[1],
    "chunk": lambda x: x.chunk(2)[0],
    "unbind": lambda x: x.unbind(0)[1],
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "to": lambda x: x.to(torch.float32),
    "float": lambda x: x.float(),
    "type_as": lambda x: x.type_as(x),
    "contiguous": lambda x: x.contiguous(),
    "view_as_complex": lambda x: torch.view_as_complex(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_leads_back_to_its_storage(view: str) -> None:
    node = last(lambda x: VIEWS[view](x + 1), SQUARE)
    assert op(alias_root(node)) == "add", node.format_node()


@pytest.mark.parametrize("view", ["transpose", "select", "split", "diagonal", "mT", "index"])
def test_a_write_through_a_view_is_a_write_to_its_storage(view: str) -> None:
    def write(x: Tensor) -> Tensor:
        VIEWS[view](x).mul_(2.0)
        return x + 1

    gm = capture(write, SQUARE.clone()).gm
    (target,) = mutated_inputs(find_node(gm, "mul_"))
    assert alias_root(target).op == "placeholder"


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "method": lambda x, y: x.add_(y),
    "augmented": lambda x, y: operator.iadd(x, y),
    "masked in place": lambda x, y: operator.iand(x, y),
    "setitem": lambda x, y: x.__setitem__(0, y[0]),
    "index_copy": lambda x, y: x.index_copy_(0, torch.tensor([1]), y[:1]),
    "masked": lambda x, y: x.masked_fill_(y > 3, 0.0),
    "out": lambda x, y: torch.add(y, y, out=x),
    "copy": lambda x, y: x.copy_(y),
    "zero": lambda x, y: x.zero_(),
    "inplace=True": lambda x, y: F.relu(x, inplace=True),
    "inplace by position": lambda x, y: F.hardtanh(x, -1.0, 1.0, True),
    "list": lambda x, y: torch._foreach_add_([x], 1.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_in_place_writes_are_seen(write: str) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        WRITES[write](x, y)
        return y + 1

    data = SQUARE.int() if write == "masked in place" else SQUARE
    gm = capture(function, data.clone(), data.clone()).gm
    written = {alias_root(t).name for n in gm.graph.nodes for t in mutated_inputs(n)}
    assert written == {"l_x_"}


PURE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "and": lambda x, y: (x > 1) & (y > 1),
    "or": lambda x, y: (x > 1) | (y > 1),
    "xor": lambda x, y: (x > 1) ^ (y > 1),
    "not": lambda x, y: ~(x > 1),
    "add": lambda x, y: x + y,
    "matmul": lambda x, y: x @ y,
    "index_copy": lambda x, y: x.index_copy(0, torch.tensor([1]), y[:1]),
    "inplace=False": lambda x, y: F.relu(x, inplace=False),
    "list": lambda x, y: torch._foreach_add([x], 1.0),
}


@pytest.mark.parametrize("pure", PURE)
def test_operators_that_write_nothing(pure: str) -> None:
    """`operator.and_` and `operator.or_` end like methods that write."""
    gm = capture(lambda x, y: PURE[pure](x, y), SQUARE, SQUARE + 1).gm
    assert not [n for n in gm.graph.nodes if mutated_inputs(n)]
    assert alias_root(last(lambda x, y: PURE[pure](x, y), SQUARE, SQUARE + 1)).op != "placeholder"


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("overload", [False, True])
def test_custom_operators_may_write_to_several_inputs(keywords: bool, overload: bool) -> None:
    update = torch.ops.avl_tests.store.default if overload else torch.ops.avl_tests.store

    def function(new: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if keywords:
            update(new, values=values, keys=keys)
        else:
            update(new, keys, values)
        return new + 1

    gm = capture(function, torch.ones(2, 1), torch.zeros(2, 3), torch.zeros(2, 3)).gm
    (node,) = (n for n in gm.graph.nodes if mutated_inputs(n))
    assert op(node) == "store"
    assert [n.name for n in mutated_inputs(node)] == ["l_keys_", "l_values_"]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("matmul", lambda x: x @ x),
        ("matmul", lambda x: x.matmul(x)),
        ("matmul", lambda x: torch.matmul(x, x)),
        ("add", lambda x: x + 1),
        ("add", lambda x: torch.add(x, 1)),
        ("mul", lambda x: torch.multiply(x, 2)),
        ("div", lambda x: torch.true_divide(x, 2)),
        ("div", lambda x: x.div(2)),
        ("eq", lambda x: x == 1),
        ("eq", lambda x: torch.eq(x, 1)),
        ("ne", lambda x: x != 1),
        ("softmax", lambda x: torch.nn.functional.softmax(x, -1)),
        ("softmax", lambda x: torch.nn.Softmax(-1)(x)),
        ("softmax", lambda x: x.softmax(-1)),
        ("softmax", lambda x: torch.special.softmax(x, -1)),
        ("transpose", lambda x: x.swapdims(0, 1)),
        ("cat", lambda x: torch.concat([x, x])),
        ("cat", lambda x: torch.concatenate([x, x])),
        ("dropout", lambda x: torch.nn.functional.dropout(x, 0.0)),
        ("linear", lambda x: torch.nn.functional.linear(x, x)),
    ],
)
def test_one_name_for_every_spelling(name: str, function: Callable[[Tensor], Tensor]) -> None:
    assert op(last(function, torch.ones(2, 2))) == name


def test_numbers() -> None:
    assert const(2) == 2.0
    assert const(True) is None
    assert const("2") is None
    assert number(0.5) == 0.5
    assert number(None) is None


class Scaled(torch.nn.Module):
    """A float attribute, which is symbolic under ``dynamic=True``."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 0.37

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.factor, x * (1.0 / x.shape[0])


def test_symbolic_floats_are_read_and_sizes_are_not() -> None:
    """Reading a size would fix it, and cost a recompilation for every length."""
    read: list[float | None] = []

    def stage(gm: Any, ctx: Any) -> Any:
        read.extend(number(n.args[1]) for n in gm.graph.nodes if op(n) == "mul")
        return PassResult("read")

    rewrite(Scaled(), torch.ones(3, 2), dynamic=True, stages=(stage,))
    assert read == [0.37, None]


def test_sizes_that_guards_have_fixed_are_ints() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, torch.ones(5, 4)) + y

    gm = capture(function, torch.ones(3, 4), torch.ones(3, 5), dynamic=True).gm
    rows, columns = shape(find_node(gm, "add"))  # type: ignore[misc]
    assert columns == 5
    assert isinstance(columns, int)
    assert not isinstance(rows, int)


def test_written_between() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        first = x + 1
        x[0] = 0.0
        second = y * 2
        return first + second

    gm = capture(function, SQUARE.clone(), SQUARE.clone()).gm
    x, y = (n for n in gm.graph.nodes if n.op == "placeholder")
    first, write, second = find_node(gm, "add"), find_node(gm, "setitem"), find_node(gm, "mul")
    assert written_between(x, first, second)
    assert written_between(x, write, second)
    assert not written_between(y, first, second)
    assert not written_between(x, second, second)
    assert not written_between(x, first, write)
