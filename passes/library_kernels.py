"""Attention that a model hands to an operator of another library, or to one of PyTorch's own fused kernels by its name.

FlashAttention's own (`flash_attn_func`, Dao-AILab) is understood: its call becomes one of SDPA in front of it, of which
`find_attention` makes what it makes of any other. Other operators that take a query, a key and a value are opaque: that
they attend is all that their names say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx

from avl_fx.passes.nodes import arg, const, number, op, operator_call, same_size, shape
from avl_fx.passes.rewrite import insert_call
from avl_fx.passes.site import Reason

__all__ = ["LibraryCall", "library_attention"]

_FLASH_ATTENTION = "flash_attn::_flash_attn_forward"
_OPERANDS = (("q", "k", "v"), ("query", "key", "value"))


@dataclass
class LibraryCall:
    """A call of another library's operator that attends."""

    node: fx.Node
    name: str
    """``library::operator``."""
    arguments: dict[str, Any]

    def operands(self) -> tuple[Any, Any, Any]:
        """Query, key and value ``[batch, heads, length, dim]``; ``None`` where their layout is unknown."""
        if self.name != _FLASH_ATTENTION:
            return None, None, None
        query, key, value = (_heads_first(self.arguments[name], self.node) for name in ("q", "k", "v"))
        return query, key, value

    def refusal(self) -> tuple[Reason, str] | None:
        """Why SDPA does not compute the same, or nobody knows whether it does; ``None``: it does."""
        if self.name != _FLASH_ATTENTION:
            return Reason.LIBRARY, self.name
        given = self.arguments.get
        if const(given("dropout_p")) != 0.0:
            return Reason.DROPOUT, ""
        if const(given("softcap", 0.0)) != 0.0:
            return Reason.SOFTCAP, ""
        if number(given("softmax_scale")) is None:
            return Reason.LOGITS, "scale is not a number"
        if given("alibi_slopes") is not None:
            return Reason.MASK, "ALiBi"
        if given("window_size_left", -1) != -1 or given("window_size_right", -1) not in (-1, 0):
            return Reason.MASK, "a window"
        if self._flag() is None:
            return Reason.MASK, "causal, with fewer queries than keys"
        if any(op(user) != "getitem" or user.args[1] != 0 for user in self.node.users):
            return Reason.WEIGHTS_USED, "more than the result is used"
        return None

    def as_sdpa(self, query: fx.Node, key: fx.Node, value: fx.Node) -> fx.Node:
        """The same as a call of SDPA, inserted in front; its result is ``[batch, heads, length, dim]``."""
        scale, is_causal = number(self.arguments["softmax_scale"]), bool(self._flag())
        sdpa = F.scaled_dot_product_attention
        return insert_call(self.node, sdpa, query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True)

    def replace(self, result: fx.Node) -> None:
        """Let ``result``, ``[batch, heads, length, dim]``, stand for what the call returns."""
        for user in list(self.node.users):
            user.replace_all_uses_with(insert_call(user, "transpose", result, 1, 2))

    def _flag(self) -> bool | None:
        """SDPA's ``is_causal``; ``None``: neither value means the same.

        Of fewer queries than keys FlashAttention says that they are the last ones, SDPA that they are the first.
        """
        given = self.arguments.get
        causal = given("causal") is True or given("window_size_right", -1) == 0
        lengths = [(shape(self.arguments[name]) or (0, 0))[1] for name in ("q", "k")]
        if not causal or lengths[0] == 1:
            return False
        return True if same_size(*lengths) else None


def library_attention(node: fx.Node) -> LibraryCall | None:
    """``node`` as a call of another library's attention, or ``None``: it calls none."""
    call = operator_call(node)
    if call is None or tuple(call[1])[:3] not in _OPERANDS:
        return None
    return LibraryCall(node, *call)


def _heads_first(node: Any, before: fx.Node) -> fx.Node:
    """``[batch, heads, length, dim]`` of ``[batch, length, heads, dim]``: what the model turned, or a view."""
    if op(node) == "transpose":
        source, dims = node.args[0], {arg(node, 1, "dim0"), arg(node, 2, "dim1")}
        if dims in ({1, 2}, {-3, -2}):
            return source
    return insert_call(before, "transpose", node, 1, 2)
