"""A small decoder whose layers can differ in everything that decides about sharing, and what sharing must compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WIDTH", "Decoder", "LayerSpec", "caches", "expected", "hidden_states", "inheriting", "specs"]

WIDTH, BATCH, LENGTH = 32, 2, 12
NAMES = "abcdefgh"


@dataclass(frozen=True)
class LayerSpec:
    """One layer. The defaults make layers that may share."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    scale: float = 0.3
    is_sliding: bool = False
    cross: bool = False
    mask: int = 0
    """Which of the masks the layer uses."""
    declared: str = ""
    """What the configuration calls the layer's attention."""
    escape: str = ""
    """Another way for the keys to leave: norm (something made of them is returned), twice (a view of them is returned
    as well), tied (values are made of new keys), summed (values are made of all keys)."""


def specs(count: int = 4, **changes: LayerSpec) -> list[LayerSpec]:
    """``count`` equal layers, with ``changes`` such as ``layer2=...``."""
    return [changes.get(f"layer{i}", LayerSpec()) for i in range(count)]


class Attention(nn.Module):
    is_causal = True

    def __init__(self, spec: LayerSpec, number: int) -> None:
        super().__init__()
        self.spec, self.layer_idx, self.scaling = spec, number, spec.scale
        self.is_sliding = spec.is_sliding
        if spec.declared:
            self.config = SimpleNamespace(layer_types=[spec.declared] * len(NAMES))
        self.q_proj = nn.Linear(WIDTH, spec.heads * spec.head_dim, bias=False)
        self.k_proj = nn.Linear(WIDTH, spec.kv_heads * spec.head_dim, bias=False)
        self.v_proj = nn.Linear(WIDTH, spec.kv_heads * spec.value_dim, bias=False)
        self.o_proj = nn.Linear(spec.heads * spec.value_dim, WIDTH, bias=False)

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, new key and new value; the rotation stands for RoPE."""
        spec = self.spec
        query = self.q_proj(x).unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
        key = self.k_proj(memory).unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
        value = self.v_proj(memory).unflatten(-1, (-1, spec.value_dim)).transpose(1, 2)
        if spec.escape == "tied":
            value = value + key
        return rotate(query), rotate(key), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        groups = self.spec.heads // self.spec.kv_heads
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any, memory: Tensor | None) -> tuple[Tensor, Any]:
        query, key, value = self.project(x, x if memory is None else memory)
        key, value, stored = store(key, value, cache)
        if self.spec.escape == "summed":
            value = value + key.mean(dim=2, keepdim=True)
        return self.attend(query, key, value, mask), stored


class Layer(nn.Module):
    def __init__(self, spec: LayerSpec, number: int) -> None:
        super().__init__()
        self.attention = Attention(spec, number)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any, memory: Tensor | None) -> tuple[Tensor, Any]:
        out, stored = self.attention(self.norm(x), mask, cache, memory)
        return x + out, stored


class Decoder(nn.Module):
    """Layers one after the other. Returns hidden states, then what the caches hold, then what escapes."""

    def __init__(self, layers: Sequence[LayerSpec], listed: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = [Layer(spec, i) for i, spec in enumerate(layers)]
        for parameter in (p for layer in made for p in layer.parameters() if p.dim() == 2):
            nn.init.normal_(parameter, std=1.5 * WIDTH**-0.5)
        if listed:
            self.layers = nn.ModuleList(made)
        else:
            for layer in made:
                del layer.attention.layer_idx
                self.add_module(f"layer_{NAMES[layer_number(made, layer)]}", layer)
        self.listed, self.count = listed, len(made)

    def each(self) -> list[Layer]:
        return list(self.layers) if self.listed else [getattr(self, f"layer_{name}") for name in NAMES[: self.count]]

    def forward(
        self, x: Tensor, masks: Sequence[Tensor | None], cached: Sequence[Any], memory: Tensor | None = None
    ) -> Any:
        stored, escaped = [], []
        for layer, cache in zip(self.each(), cached, strict=True):
            spec = layer.attention.spec
            x, pair = layer(x, masks[spec.mask], cache, memory if spec.cross else None)
            stored += pair
            escaped += leak(spec.escape, pair)
        return x, stored, escaped


def layer_number(layers: list[Layer], layer: Layer) -> int:
    return next(i for i, other in enumerate(layers) if other is layer)


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([x[..., half:], -x[..., :half]], dim=-1) * 0.5 + x


def store(key: Tensor, value: Tensor, cache: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Put new keys and values into a cache; returns all of them, and what a model would return."""
    if cache is None:
        return key, value, []
    kind, *state = cache
    if kind == "cat":
        key, value = torch.cat([state[0], key], dim=2), torch.cat([state[1], value], dim=2)
        return key, value, [key, value]
    if kind == "first":
        return key, value, [key, value]
    if kind == "static":
        past_key, past_value, at = state
        past_key.index_copy_(2, at, key)
        past_value.index_copy_(2, at, value)
        return past_key, past_value, []
    if kind == "one_buffer":
        buffer, at = state
        buffer[0].index_copy_(2, at, key)
        buffer[1].index_copy_(2, at, value)
        return buffer[0], buffer[1], []
    if kind == "made_here":
        (at,) = state
        past_key = torch.zeros(key.shape[0], key.shape[1], LENGTH, key.shape[3])
        past_value = torch.zeros(value.shape[0], value.shape[1], LENGTH, value.shape[3])
        past_key.index_copy_(2, at, key)
        past_value.index_copy_(2, at, value)
        return past_key, past_value, [past_key, past_value]
    raise ValueError(kind)


def leak(how: str, pair: Sequence[Tensor]) -> list[Tensor]:
    if how == "norm":
        return [pair[0].norm(dim=-1)]
    if how == "twice":
        return [pair[0].transpose(2, 3)]
    return []


def hidden_states(queries: int, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, queries, WIDTH, generator=torch.Generator().manual_seed(seed))


def caches(kind: str, layers: Sequence[LayerSpec], past: int = 4, queries: int = 1) -> list[Any]:
    """A cache for every layer, with ``past`` keys in it."""
    at = torch.arange(past, past + queries)
    made: list[Any] = []
    for number, spec in enumerate(layers):
        generator = torch.Generator().manual_seed(number)
        length = past if kind == "cat" else LENGTH
        key = torch.randn(BATCH, spec.kv_heads, length, spec.head_dim, generator=generator)
        value = torch.randn(BATCH, spec.kv_heads, length, spec.value_dim, generator=generator)
        if kind == "none":
            made.append(None)
        elif kind == "first":
            made.append(("first",))
        elif kind == "made_here":
            made.append(("made_here", at))
        elif kind == "one_buffer":
            made.append(("one_buffer", torch.stack([key, value]), at))
        else:
            made.append((kind, key, value, *([at] if kind == "static" else [])))
    return made


@torch.no_grad()
def expected(
    model: Decoder, anchors: dict[int, int], x: Tensor, masks: Sequence[Tensor | None], cached: Sequence[Any]
) -> Any:
    """What ``model`` computes when layer ``i`` uses query and key of layer ``anchors[i]``; written out by hand."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    stored: list[Any] = []
    for number, (layer, cache) in enumerate(zip(model.each(), cached, strict=True)):
        attention = layer.attention
        normed = layer.norm(x)
        query, key, value = attention.project(normed, normed)
        key, value, pair = store(key, value, cache)
        if attention.spec.escape == "summed":
            value = value + key.mean(dim=2, keepdim=True)
        if number in anchors:
            query, key = seen[anchors[number]]
        seen[number] = (query, key)
        stored += [None if number in anchors and i == 0 else t for i, t in enumerate(pair)]
        x = x + attention.attend(query, key, value, masks[attention.spec.mask])
    return x, stored


@torch.no_grad()
def inheriting(
    model: Decoder,
    mode: str,
    x: Tensor,
    visual: Tensor,
    mask: Tensor,
    before: Callable[[int, Tensor], Tensor] = lambda number, x: x,
) -> list[Tensor]:
    """Hidden states, then keys and values, of a prompt where the layers behind the first inherit from it.

    Written out by hand: at positions ``visual`` bool ``[batch, tokens]``, in mode ``vla`` or ``vla_scores``. ``before``
    is what happens to hidden states in front of each layer.
    """
    stored: list[Tensor] = []
    anchor = None
    for number, layer in enumerate(model.each()):
        x = before(number, x)
        attention, normed = layer.attention, layer.norm(x)
        query, key, value = attention.project(normed, normed)
        anchor = anchor or (query, key)
        if mode == "vla":
            pairs = zip(anchor, (query, key), strict=True)
            query, key = (torch.where(visual[:, None, :, None], *pair) for pair in pairs)
        stored += [key, value]
        repeats = attention.spec.heads // attention.spec.kv_heads
        own, theirs = (q @ k.repeat_interleave(repeats, 1).mT for q, k in ((query, key), anchor))
        logits = torch.where(visual[:, None, None], theirs, own) if mode == "vla_scores" else own
        weights = (logits * attention.scaling).masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + attention.o_proj((weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2).flatten(2))
    return [x, *stored]
