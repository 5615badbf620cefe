"""How an oracle gets between a model and its attention.

An oracle is anything with `attend(layer, q, k, v, mask, scale, causal) -> out`. Transformers models are reached through
the attention interface. A model of our own offers `layer.attend(q, k, v, mask)` on each decoder layer, and that is
replaced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Oracle(Protocol):
    """What stands in for the attention of every decoder layer."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        """q [B, H, Q, D]; k, v [B, KV, K, D] -> [B, H, Q, D]."""


def logits_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled products [B, H, Q, K]. q [B, H, Q, D]; k [B, KV, K, D]."""
    return torch.matmul(q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2)) * scale


def softmax_rows(logits: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Softmax rows [B, H, Q, K] in float32. mask bool (True: visible) or additive.

    `causal` counts from the upper left corner, as SDPA does, and applies where there is no mask.
    """
    if mask is None and causal:
        mask = torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(logits.dtype).min
        mask = torch.zeros(mask.shape, dtype=logits.dtype, device=logits.device).masked_fill(~mask, lowest)
    return torch.softmax(logits if mask is None else logits + mask, dim=-1, dtype=torch.float32)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """Softmax rows [B, H, Q, K] in float32; shapes as in `logits_of`, mask and causal as in `softmax_rows`."""
    return softmax_rows(logits_of(q, k, scale), mask, causal)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """Softmax attention, spelled out; shapes as in `attention_weights`, v [B, KV, K, D]."""
    return weighted(attention_weights(q, k, mask, scale, causal), v)


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    """Values [B, KV, K, D] by softmax rows [B, H, Q, K]: [B, H, Q, D], in the dtype of the values."""
    return torch.matmul(weights.to(v.dtype), v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1))


@contextmanager
def in_charge(model: nn.Module, layers: list[Any], oracle: Oracle) -> Iterator[None]:
    """Let `oracle` attend for each of the decoder `layers` of `model`."""
    with _plain(layers, oracle) if hasattr(layers[0], "attend") else _transformers(model, layers, oracle):
        yield


# --- a model of our own: `layer.attend(q, k, v, mask)` ---


@contextmanager
def _plain(layers: list[Any], oracle: Oracle) -> Iterator[None]:
    def replace(index: int, layer: Any) -> None:
        layer.attend = lambda q, k, v, mask: oracle.attend(index, q, k, v, mask, q.shape[-1] ** -0.5, False)

    for index, layer in enumerate(layers):
        replace(index, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.attend


# --- transformers ---

# The modules that an oracle is in charge of at the moment; any other module attends as it did.
_in_charge: WeakKeyDictionary[nn.Module, tuple[Oracle, int]] = WeakKeyDictionary()


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if module not in _in_charge:
        kwargs |= {} if position_bias is None else {"position_bias": position_bias}
        return _STOCK(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs)
    unknown = [name for name in ("softcap", "s_aux", "sinks", "indices") if kwargs.get(name) is not None]
    if unknown or kwargs.get("dropout"):
        raise NotImplementedError(f"the oracle does not know {unknown or 'dropout'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and query.shape[2] > 1
    if position_bias is not None:
        attention_mask = _biased(position_bias, attention_mask, causal)
    oracle, layer = _in_charge[module]
    out = oracle.attend(layer, query, key, value, attention_mask, scale, causal)
    return out.transpose(1, 2).contiguous(), None


def _biased(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """What a layer adds to its logits by itself [B, H, Q, K], and what it may not see, as one additive mask."""
    if mask is None and causal:
        mask = torch.ones(bias.shape[2:], dtype=torch.bool, device=bias.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias if mask is None else bias + mask


_NAMES = ("sdpa", "eager")
_STOCK = ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextmanager
def _transformers(model: Any, layers: list[nn.Module], oracle: Oracle) -> Iterator[None]:
    """Stand in for what the model attends with, under its own name: some mask their keys only where they know that."""
    used = model.config.get_text_config()._attn_implementation
    assert used in _NAMES, used
    inside = [(module, index) for index, layer in enumerate(layers) for module in layer.modules()]
    for module, index in inside:
        _in_charge[module] = (oracle, index)
    for name in _NAMES:
        ALL_ATTENTION_FUNCTIONS[name] = _interface
    try:
        yield
    finally:
        for module, _ in inside:
            del _in_charge[module]
        if not _in_charge:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = _STOCK
            del ALL_ATTENTION_FUNCTIONS["eager"]  # it is each model's own
