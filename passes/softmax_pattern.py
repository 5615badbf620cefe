"""Walks from a softmax to the attention around it: ``softmax(query @ key^T * scale + mask) @ value``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from avl_fx.passes.nodes import arg, const, fake, number, op, same_shape, same_size, shape, tensor_inputs, where_args
from avl_fx.passes.rewrite import insert_call
from avl_fx.passes.site import Reason

__all__ = ["NotAttention", "Refusal", "SoftmaxMatch", "match_softmax"]

_CASTS = frozenset({"to", "float", "type", "type_as", "bfloat16", "half", "double"})
_MATMULS = frozenset({"matmul", "bmm"})
_CUTS = frozenset({"getitem", "narrow"})


class NotAttention(Exception):
    """The softmax is something else (a router, a classifier head): no site at all."""


class Refusal(Exception):
    """An attention that cannot be carried exactly."""

    def __init__(self, reason: Reason, detail: str = "", value: fx.Node | None = None) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.value = reason, detail, value


@dataclass
class SoftmaxMatch:
    """An attention spelled as two matmuls around a softmax."""

    output: fx.Node
    """The second matmul: what the canonical node replaces."""
    product: fx.Node
    """The first matmul: where query and key are read."""
    query: fx.Node
    key_transposed: fx.Node
    """``[batch, heads, head_dim, keys]`` as given to the first matmul."""
    value: fx.Node
    scale: float = 1.0
    build_mask: Callable[[], fx.Node | None] = field(default=lambda: None)
    mask_source: fx.Node | None = None
    """What `build_mask` makes the mask of: the model's own mask."""

    def key(self) -> fx.Node:
        """``[batch, heads, keys, head_dim]``: the input of the model's own transpose, or a new transpose."""
        node = self.key_transposed
        if op(node) in ("transpose", "permute", "mT") and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            before, after = shape(source), shape(node)
            if before is not None and after is not None and _swaps_last_two(node, len(before)):
                return source
        return insert_call(self.output, "transpose", node, -2, -1)


def _swaps_last_two(node: fx.Node, rank: int) -> bool:
    if op(node) == "mT":
        return True
    if op(node) == "transpose":
        dims = [arg(node, 1, "dim0"), arg(node, 2, "dim1")]
        return all(isinstance(d, int) for d in dims) and {d % rank for d in dims} == {rank - 2, rank - 1}
    dims = list(node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:])
    return [d % rank for d in dims] == [*range(rank - 2), rank - 1, rank - 2]


def match_softmax(node: fx.Node) -> SoftmaxMatch:
    """Match the attention around the softmax ``node``.

    Raises:
        NotAttention: no second matmul takes the softmax as its left operand.
        Refusal: it is an attention, but one that the canonical node cannot express.
    """
    output, value = _walk_forward(node)
    rank = len(shape(node) or ())
    dim = arg(node, 1, "dim")  # without one `F.softmax` guesses, and of four dimensions it takes the second
    if not isinstance(dim, int) or dim % rank != rank - 1:
        raise Refusal(Reason.SOFTMAX_DIM, f"dim {dim} of {rank}", value)
    return _walk_back(node, output, value)


def _walk_forward(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """From the softmax over casts and idle dropout to the product with the values.

    A sink is a column of logits behind the keys whose weights are cut off again.
    """
    if len(shape(node) or ()) != 4:
        raise NotAttention
    current, used_elsewhere, cut = node, False, False
    dropout: fx.Node | None = None
    while True:
        steps = [u for u in current.users if _keeps_weights(u) and u.args and u.args[0] is current]
        products = [u for u in current.users if op(u) in _MATMULS and arg(u, 0, "input") is current]
        if len(products) == 1:
            output = products[0]
            value = arg(output, 1, "other")
            if cut:
                raise Refusal(Reason.SINKS, "", value)
            if len(current.users) > 1 or used_elsewhere:
                raise Refusal(Reason.WEIGHTS_USED, "", value)
            if dropout is not None:
                raise Refusal(Reason.DROPOUT, "", value)
            return output, value
        if len(products) > 1:
            raise Refusal(Reason.WEIGHTS_USED, "multiplied more than once")
        if len(steps) != 1:
            raise NotAttention
        used_elsewhere |= len(current.users) > 1
        current = steps[0]
        cut |= op(current) in _CUTS
        if op(current) == "dropout":
            rate = const(arg(current, 1, "p", 0.5))
            if rate != 0.0 and arg(current, 2, "training", True) is not False:
                dropout = current


def _keeps_weights(node: fx.Node) -> bool:
    """Whether ``node`` gives the weights that it takes, of all keys or of some."""
    if op(node) in _CUTS:
        before, after = shape(node.args[0]), shape(node)
        return before is not None and after is not None and all(map(same_size, after[:-1], before[:-1]))
    return op(node) == "dropout" or (op(node) in _CASTS and fake(node).dtype.is_floating_point)


def _walk_back(softmax: fx.Node, output: fx.Node, value: fx.Node) -> SoftmaxMatch:
    """From the softmax over casts, one mask and scales to the product of query and key."""
    scale = 1.0
    mask: Callable[[], fx.Node | None] | None = None
    source: fx.Node | None = None
    beside: set[fx.Node] = set()
    current = arg(softmax, 0, "input")
    while True:
        if not isinstance(current, fx.Node):
            raise Refusal(Reason.LOGITS, "not a tensor", value)
        name = op(current)
        elsewhere = len(current.users.keys() - beside) > 1
        if name not in _MATMULS and elsewhere:
            raise Refusal(Reason.WEIGHTS_USED, f"logits after {name}", value)
        if name in _MATMULS:
            if elsewhere:
                raise Refusal(Reason.WEIGHTS_USED, "logits", value)
            query, key = arg(current, 0, "input"), arg(current, 1, "other")
            return SoftmaxMatch(output, current, query, key, value, scale, mask or (lambda: None), source)
        if name in _CASTS and fake(current).dtype.is_floating_point:
            current = current.args[0]
        elif name in ("mul", "div", "mul_", "div_"):
            current, factor = _scaled(current, value)
            scale *= factor
            if mask is None and _mask_below(current):
                raise Refusal(Reason.MASK, "the mask is scaled too", value)
        elif name in ("add", "add_"):
            if mask is not None:
                raise Refusal(Reason.MASK, "more than one mask", value)
            current, source = _biased(current, value)
            mask = _constant(source)
        elif name in ("masked_fill", "masked_fill_", "where"):
            if mask is not None:
                raise Refusal(Reason.MASK, "more than one mask", value)
            current, source, mask = _filled(current, output, value)
        elif (maximum := _maximum_taken_off(current)) is not None:
            current = current.args[0]
            beside.add(maximum)
        elif name == "tanh":
            raise Refusal(Reason.SOFTCAP, "", value)
        else:
            raise Refusal(Reason.LOGITS, f"{name or current.op} before the softmax", value)


def _maximum_taken_off(node: fx.Node) -> fx.Node | None:
    """The maximum of ``logits - logits.max(-1, keepdim=True).values``: a softmax is the same without it."""
    logits, values = arg(node, 0, "input"), arg(node, 1, "other")
    if op(node) != "sub" or node.kwargs.get("alpha", 1) != 1 or not isinstance(values, fx.Node):
        return None
    maximum = values.args[0] if op(values) == "getitem" and values.args[1] == 0 else values
    if not isinstance(maximum, fx.Node) or op(maximum) not in ("max", "amax") or len(values.users) != 1:
        return None
    dim, rank = arg(maximum, 1, "dim"), len(shape(node) or ())
    over_keys = isinstance(dim, int) and dim % rank == rank - 1 and arg(maximum, 2, "keepdim", False) is True
    alone = all(user is values or not user.users for user in maximum.users) or values is maximum
    return maximum if over_keys and alone and maximum.args[0] is logits else None


def _constant(node: fx.Node) -> Callable[[], fx.Node | None]:
    return lambda: node


def _scaled(node: fx.Node, value: fx.Node) -> tuple[fx.Node, float]:
    left, right = arg(node, 0, "input"), arg(node, 1, "other")
    divides = op(node).startswith("div")
    if node.kwargs.get("rounding_mode") is not None:
        raise Refusal(Reason.LOGITS, "division that rounds", value)
    factor = number(right)
    if factor is not None and isinstance(left, fx.Node):
        if divides and factor == 0.0:
            raise Refusal(Reason.LOGITS, "division by zero", value)
        return left, 1.0 / factor if divides else factor
    factor = number(left)
    if factor is not None and isinstance(right, fx.Node) and not divides:
        return right, factor
    if any(op(x) == "tanh" for x in (left, right)):
        raise Refusal(Reason.SOFTCAP, "", value)
    raise Refusal(Reason.LOGITS, "scale is not a number", value)


def _mask_below(node: fx.Node) -> bool:
    """Whether a mask stands between ``node`` and the product: it would have been scaled with the logits."""
    while isinstance(node, fx.Node) and op(node) not in _MATMULS:
        if op(node) in ("add", "add_", "masked_fill", "masked_fill_", "where"):
            return True
        if op(node) not in _CASTS | {"mul", "div", "mul_", "div_"}:
            return False
        node = next(tensor_inputs(node), None)  # type: ignore[assignment]
    return False


def _leads_to_product(node: fx.Node) -> bool:
    for _ in range(8):
        if op(node) in _MATMULS:
            return True
        if op(node) not in _CASTS | {"mul", "div", "mul_", "div_", "tanh"}:
            return False
        following = next(tensor_inputs(node), None)
        if following is None:
            return False
        node = following
    return False


def _biased(node: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = arg(node, 0, "input"), arg(node, 1, "other")
    if node.kwargs.get("alpha", 1) != 1 or not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        raise Refusal(Reason.MASK, "added with a factor, or not a tensor", value)
    sides = [(_leads_to_product(a), a, b) for a, b in ((left, right), (right, left))]
    leading = [(a, b) for leads, a, b in sides if leads]
    if len(leading) != 1:
        raise Refusal(Reason.LOGITS, "sum without exactly one product of query and key", value)
    logits, bias = leading[0]
    if not same_shape(logits, node):
        raise Refusal(Reason.MASK, "the mask broadcasts the logits", value)
    if not fake(bias).dtype.is_floating_point:  # a sum adds one where it is true, a mask hides where it is false
        raise Refusal(Reason.MASK, f"{str(fake(bias).dtype).removeprefix('torch.')} numbers are added", value)
    return logits, bias


def _filled(node: fx.Node, output: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node, Callable[[], fx.Node | None]]:
    """``masked_fill(logits, hidden, low)`` or ``where(visible, logits, low)``: logits, the model's mask, and ours."""
    if op(node) == "where":
        visible, logits, low = where_args(node)
        hidden = None
        if const(logits) is not None:
            visible, hidden, logits, low = None, visible, low, logits
    else:
        logits, hidden, low = arg(node, 0, "input"), arg(node, 1, "mask"), arg(node, 2, "value")
        visible = None
    if not isinstance(logits, fx.Node) or not same_shape(logits, node):
        raise Refusal(Reason.MASK, "the mask broadcasts the logits", value)
    fill = const(low)
    if fill is None:
        raise Refusal(Reason.MASK, "filled with a computed value", value)
    work = fake(logits).dtype
    if fill > torch.finfo(work).min / 4:
        raise Refusal(Reason.MASK, f"filled with {fill}", value)
    if fill != float("-inf") and fake(node).requires_grad:
        # A row that is hidden altogether is uniform, and a fill lets no gradient through to its logits: a sum would.
        raise Refusal(Reason.GRADIENT, f"logits are filled with {fill}", value)
    source = hidden if visible is None else visible
    if not isinstance(source, fx.Node):
        raise Refusal(Reason.MASK, "not a tensor", value)

    def build() -> fx.Node:
        shown = visible if visible is not None else insert_call(output, "logical_not", hidden)
        if fill == float("-inf"):
            return shown
        # A finite fill keeps fully hidden rows uniform; a boolean mask would make them zero. The lowest float16 is too
        # small a number for that: adding it does not absorb the logits.
        dtype = torch.float32 if fake(value).dtype == torch.float16 else fake(value).dtype
        zeros = insert_call(output, torch.zeros_like, shown, dtype=dtype)
        covered = hidden if hidden is not None else insert_call(output, "logical_not", visible)
        return insert_call(output, "masked_fill", zeros, covered, torch.finfo(dtype).min)

    return logits, source, build
