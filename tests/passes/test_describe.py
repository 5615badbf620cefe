"""What a site says about itself: whose it is, which layer, which cache, which kind of attention."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avl_fx.passes.context import PassContext
from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.site import Site
from tests.passes._graphs import rewrite

WIDTH = 16


class Attention(nn.Module):
    """Self-attention, or cross-attention where a memory is given."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Any = None, cache: Any = None) -> Any:
        source = x if memory is None else memory
        query, key, value = (
            p(s).unflatten(-1, (2, 8)).transpose(1, 2) for p, s in ((self.q, x), (self.k, source), (self.v, source))
        )
        if cache is not None and len(cache) == 2:
            key, value = (torch.cat([c, new], dim=2) for c, new in zip(cache, (key, value), strict=True))
        elif cache is not None:
            keys, values, at = cache
            key, value = keys.index_copy_(2, at, key), values.index_copy_(2, at, value)
        causal = isinstance(mask, str) and mask == "flag"
        mask = position_mask(mask, x) if isinstance(mask, str) and not causal else None if causal else mask
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        out = out.transpose(1, 2).reshape(x.shape)
        return (out, key, value) if cache is not None and len(cache) == 2 else out


def position_mask(kind: str, x: Tensor) -> Tensor:
    length = x.shape[1]
    positions = torch.arange(length)
    if kind == "compared":
        return positions[None, :] <= positions[:, None]
    if kind == "triangle":
        return torch.ones(length, length).tril().bool()
    return torch.full((length, length), -1e30).triu(1)


def inputs(length: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def site_of(module: nn.Module, *args: Any) -> Site:
    return rewrite(Holder(module), *args, stages=(find_attention,)).site


class Holder(nn.Module):
    """A model whose attention has a path."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.text = nn.Module()
        self.text.layers = nn.ModuleList([nn.Identity(), nn.Identity(), nn.ModuleDict({"attention": attention})])

    def forward(self, *args: Any) -> Any:
        return self.text.layers[2]["attention"](*args)


def test_paths_layers_and_towers() -> None:
    site = site_of(Attention(), inputs())
    assert site.module_path == "text.layers.2.attention"
    assert site.module_class == "Attention"
    assert (site.tower, site.layer, site.depth) == ("text.layers", 2, 3)


def test_shapes_and_scale() -> None:
    site = site_of(Attention(), inputs())
    assert (site.batch, site.queries, site.keys, site.heads, site.kv_heads) == (2, 5, 5, 2, 2)
    assert (site.head_dim, site.value_dim, site.dtype, site.device) == (8, 8, "float32", "cpu")
    assert site.scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize(
    ("role", "attributes", "mask"),
    [
        ("encoder", {}, None),
        ("encoder", {"is_causal": False}, None),
        ("encoder", {"is_causal": False}, torch.zeros(5, 5)),
        ("decoder", {"is_causal": True}, None),
        ("decoder", {"is_causal": True}, torch.zeros(5, 5)),
        ("decoder", {}, "flag"),
        ("decoder", {}, "compared"),
        ("decoder", {}, "triangle"),
        ("decoder", {}, "added triangle"),
        ("unknown", {}, torch.zeros(5, 5)),
    ],
)
def test_roles(role: str, attributes: dict[str, Any], mask: Any) -> None:
    assert site_of(Attention(**attributes), inputs(), None, mask).role == role


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("of", "role"), [("itself", "decoder"), ("others", "encoder"), ("nothing", "encoder")])
def test_where_the_decoder_is_known_looks_do_not_count(of: str, role: str, causal: bool) -> None:
    module = Attention(is_causal=causal)
    known = {"itself": {module}, "others": {nn.Identity()}, "nothing": set()}[of]
    found = rewrite(
        Holder(module),
        inputs(),
        stages=(find_attention,),
        edit=lambda ctx: setattr(ctx, "decoder_modules", frozenset(known)),
    )
    assert found.site.role == role


@pytest.mark.parametrize(
    ("attributes", "mask", "role"),
    [({}, None, "unknown"), ({"is_causal": False}, None, "decoder"), ({}, torch.zeros(5, 5), "decoder")],
)
def test_a_decoder_may_attend_to_something_else_than_tokens(attributes: dict[str, Any], mask: Any, role: str) -> None:
    """No cache, no mask, and a module that says nothing about order: it may be anything."""
    module = Attention(**attributes)
    found = rewrite(
        Holder(module),
        inputs(),
        None,
        mask,
        stages=(find_attention,),
        edit=lambda ctx: setattr(ctx, "decoder_modules", frozenset({module})),
    )
    assert found.site.role == role


def test_a_module_that_cannot_be_reached_may_be_any() -> None:
    """A name in the graph that leads nowhere says nothing about the decoder, wherever that is."""

    def lost(ctx: PassContext) -> None:
        ctx.decoder_modules, ctx.resolve_module = frozenset({nn.Identity()}), lambda path: None

    for mask, role in (("flag", "decoder"), (None, "encoder")):
        holder = Holder(Attention())
        assert rewrite(holder, inputs(), None, mask, stages=(find_attention,), edit=lost).site.role == role


def test_a_cache_makes_a_decoder_of_what_the_model_does_not_name() -> None:
    cache = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    found = rewrite(
        Holder(Attention()),
        inputs(1),
        None,
        None,
        cache,
        stages=(find_attention,),
        edit=lambda ctx: setattr(ctx, "decoder_modules", frozenset()),
    )
    assert found.site.role == "decoder"


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
def test_caches_make_a_decoder(kind: str) -> None:
    def state() -> tuple[Tensor, Tensor]:
        return torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)

    cache = {"none": None, "dynamic": state(), "static": (*state(), torch.tensor([3]))}[kind]
    site = site_of(Attention(), inputs(1), None, None, cache)
    assert site.cache == kind
    assert site.role == ("encoder" if kind == "none" else "decoder")
    assert site.kind == "full"


def test_attention_over_something_else_is_cross_attention() -> None:
    site = site_of(Attention(), inputs(), inputs(7, seed=1))
    assert (site.kind, site.role, site.keys) == ("cross", "cross", 7)


class LatentAttention(nn.Module):
    """Queries and keys are projected from latents of their own (DeepSeek-V3), and keys are put together from parts."""

    def __init__(self) -> None:
        super().__init__()
        self.to_latent = nn.ModuleList(nn.Linear(WIDTH, 6) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(6, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        latents = [p(s).relu() for p, s in zip(self.to_latent, (x, x if memory is None else memory), strict=True)]
        projected = zip((self.q, self.k, self.v), (latents[0], *latents[1:] * 2), strict=True)
        query, part, value = (p(latent).unflatten(-1, (2, 8)).transpose(1, 2) for p, latent in projected)
        key = part.new_empty(part.shape)
        key[..., :4].copy_(part[..., :4])
        key[..., 4:].copy_(part[..., 4:])
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)


def test_latents_of_one_hidden_state_are_self_attention() -> None:
    site = site_of(LatentAttention(), inputs())
    assert (site.kind, site.cache) == ("full", "other")
    assert site_of(LatentAttention(), inputs(), inputs(7, seed=1)).kind == "cross"


class TwoQueries(nn.Module):
    """A layer with keys and values, and one that reads them, too (Gemma 3n)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.second = Attention(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Any) -> Any:
        out, key, value = self.first(x, None, None, cache)
        query = self.second(self.between(out).relu()).unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value), key, value


def test_keys_of_an_earlier_layer_are_self_attention() -> None:
    cache = (torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8))
    sites = rewrite(Holder(TwoQueries()), inputs(1), cache, stages=(find_attention,)).sites
    assert [(site.kind, site.cache) for site in sites] == [("full", "dynamic")] * 2


def test_declared_cross_attention() -> None:
    """Its keys may come from a cache that this graph never writes."""
    assert site_of(Attention(is_cross_attention=True), inputs()).kind == "cross"


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("sliding", {"is_sliding": True}),
        ("sliding", {"sliding_window": 4}),
        ("full", {"is_sliding": False, "sliding_window": None}),
        ("full", {"is_sliding": False, "sliding_window": 4}),
        ("full", {}),
    ],
)
def test_sliding_windows_are_declared_by_the_module(kind: str, attributes: dict[str, Any]) -> None:
    assert site_of(Attention(**attributes), inputs(), None, "compared").kind == kind


@pytest.mark.parametrize(
    ("kind", "types", "attributes"),
    [
        ("chunked", ["full_attention", "chunked_attention"], {"layer_idx": 1}),
        ("full", ["full_attention", "chunked_attention"], {"layer_idx": 0}),
        ("hybrid", ["hybrid"], {"layer_idx": 0}),
        ("full", ["attention"], {"layer_idx": 0}),
        ("sliding", ["full_attention"], {"layer_idx": 0, "is_sliding": True}),  # the module knows best
        ("full", ["chunked_attention"], {}),  # whose number is not known
        ("full", ["chunked_attention"], {"layer_idx": 1}),
        ("full", None, {"layer_idx": 0}),
    ],
)
def test_other_kinds_are_declared_by_the_configuration(
    kind: str, types: list[str] | None, attributes: dict[str, Any]
) -> None:
    config = SimpleNamespace(layer_types=types)
    assert site_of(Attention(config=config, **attributes), inputs(), None, "compared").kind == kind


@pytest.mark.parametrize("symbolic", [False, True])
def test_sites_are_plain_data(symbolic: bool) -> None:
    """Reports are JSON: no SymInt, no node."""
    rewritten = rewrite(Holder(Attention()), inputs(), stages=(find_attention,), dynamic=True if symbolic else None)
    data = rewritten.site.to_dict()
    again = json.loads(json.dumps(data))
    assert again == data
    assert isinstance(data["queries"], str if symbolic else int)
    assert rewritten.site.node is not None, "and the site keeps its node"


def test_refused_sites_are_plain_data_too() -> None:
    """With heads and head dim symbolic."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    rewritten = rewrite(attend, *(torch.randn(2, 4, 5, 8) for _ in range(3)), dynamic=True, stages=(find_attention,))
    assert rewritten.site.reason is not None
    json.dumps(rewritten.site.to_dict())
    assert (rewritten.site.heads, rewritten.site.head_dim, rewritten.site.value_dim) == (0, 0, 0)
