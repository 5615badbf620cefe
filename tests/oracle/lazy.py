"""The oracle for lazy attention, mode "gla": slow and obvious.

    with lazy_oracle(model, blocks=[(1, 3)], decoder_prefix="model.language_model.layers", kinds=["full"] * 4):
        model.generate(**inputs)

A block is an inclusive range of decoder layers. Its first layer is the anchor; the others are lazy. A lazy layer
attends with the queries and keys that the anchor's attention received in the same forward pass (after norms, RoPE and
the cache, so keys of the whole history), and with its own values, mask, scale and everything else. It still computes,
and caches, queries and keys of its own, which nobody reads.

Some layers of a block stay dense: one whose kind (full, sliding, cross) is not the anchor's, one whose queries or keys
have another shape, every cross-attention layer, and the whole block if the anchor is a cross-attention layer.

Transformers models are reached through the attention interface. A model of our own offers `layer.attend(q, k, v, mask)`
on each decoder layer, which is replaced.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

Blocks = Sequence[tuple[int, int]]


class LazyOracle:
    """What each layer does. `lazy`: layer -> its anchor; `dense`: layer of a block that stays dense -> why."""

    def __init__(self, blocks: Blocks, kinds: Sequence[str]) -> None:
        self.lazy: dict[int, int] = {}
        self.dense: dict[int, str] = {}
        self.calls = 0  # attentions that used an anchor's queries and keys
        self._from_anchor: dict[int, tuple[Tensor, Tensor]] = {}
        seen: set[int] = set()
        for first, last in blocks:
            layers = range(first, last + 1)
            if first < 0 or last >= len(kinds) or first > last or seen & set(layers):
                raise ValueError(f"blocks {list(blocks)} overlap or leave the {len(kinds)} layers")
            seen |= set(layers)
            for layer in layers:
                if kinds[first] == "cross":
                    self.dense[layer] = "the anchor is a cross-attention layer"
                elif layer > first and kinds[layer] != kinds[first]:
                    self.dense[layer] = f"kind {kinds[layer]}, anchor {kinds[first]}"
                elif layer > first:
                    self.lazy[layer] = first

    def queries_and_keys(self, layer: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Those that `layer` attends with, given its own."""
        if layer in self.lazy.values():  # an anchor: each forward pass overwrites what the last one left
            self._from_anchor[layer] = (q, k)
        if layer not in self.lazy:
            return q, k
        anchor_q, anchor_k = self._from_anchor[self.lazy[layer]]
        if anchor_q.shape != q.shape or anchor_k.shape != k.shape:
            self.dense[layer] = f"q {[*q.shape]} and k {[*k.shape]}, anchor {[*anchor_q.shape]} and {[*anchor_k.shape]}"
            del self.lazy[layer]
            return q, k
        self.calls += 1
        return anchor_q, anchor_k


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """Softmax attention, spelled out. q [B, H, Q, D]; k, v [B, KV, K, D]; mask bool (True: visible) or additive.

    `causal` counts from the upper left corner, as SDPA does, and applies where there is no mask.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if mask is None and causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


@contextmanager
def lazy_oracle(
    model: nn.Module,
    blocks: Blocks,
    decoder_prefix: str = "model.language_model.layers",
    kinds: Sequence[str] | None = None,
) -> Iterator[LazyOracle]:
    """Run `model` with lazy attention in `blocks`. `kinds`, a layer: "full", "sliding" or "cross"; all full if None."""
    layers = list(model.get_submodule(decoder_prefix))
    oracle = LazyOracle(blocks, kinds or ["full"] * len(layers))
    with _plain(layers, oracle) if hasattr(layers[0], "attend") else _transformers(model, layers, oracle):
        yield oracle


# --- a model of our own: `layer.attend(q, k, v, mask)` ---


@contextmanager
def _plain(layers: list[Any], oracle: LazyOracle) -> Iterator[None]:
    def replace(index: int, layer: Any) -> None:
        def lazily(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            q, k = oracle.queries_and_keys(index, q, k)
            return attend(q, k, v, mask, q.shape[-1] ** -0.5)

        layer.attend = lazily

    for index, layer in enumerate(layers):
        replace(index, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.attend


# --- transformers ---

# The modules that an oracle is in charge of at the moment; any other module attends densely.
_in_charge: WeakKeyDictionary[nn.Module, tuple[LazyOracle, int]] = WeakKeyDictionary()


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
    if unknown or kwargs.get("dropout"):
        raise NotImplementedError(f"the oracle does not know {unknown or 'dropout'}")
    if module in _in_charge:
        oracle, layer = _in_charge[module]
        query, key = oracle.queries_and_keys(layer, query, key)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attend(query, key, value, attention_mask, scale, causal=causal and query.shape[2] > 1)
    return out.transpose(1, 2).contiguous(), None


for _masks in ("sdpa", "eager"):
    AttentionInterface.register(f"lazy_oracle_{_masks}", _interface)
    AttentionMaskInterface.register(f"lazy_oracle_{_masks}", ALL_MASK_ATTENTION_FUNCTIONS[_masks])


@contextmanager
def _transformers(model: Any, layers: list[nn.Module], oracle: LazyOracle) -> Iterator[None]:
    """Point the decoder's configs at our interface. Masks stay those of the implementation that the model had."""
    inside = [(module, index) for index, layer in enumerate(layers) for module in layer.modules()]
    configs = {id(config): config for module, _ in inside if (config := getattr(module, "config", None)) is not None}
    text = model.config.get_text_config()
    configs[id(text)] = text
    before = {key: config._attn_implementation for key, config in configs.items()}
    for module, index in inside:
        _in_charge[module] = (oracle, index)
    for config in configs.values():
        config._attn_implementation = f"lazy_oracle_{config._attn_implementation}"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for module, _ in inside:
            del _in_charge[module]
