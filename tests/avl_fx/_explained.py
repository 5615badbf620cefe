"""Reports that several tests read, each made once, and small models that take no time to explain."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import avl_fx
from avl_fx.plan import Plan
from avl_fx.report import Report
from tests.zoo import get

BLOCK = (1, 3)
LAZY = (2, 3)
"""The lazy layers of `BLOCK`."""
TOKENS = 3


@cache
def zoo_model(name: str) -> nn.Module:
    return get(name).make()


def own_loop(model: nn.Module, **inputs: Tensor) -> Any:
    """What `run=` is for: the hand-written model has a generate of its own."""
    return model.generate(**inputs, steps=TOKENS - 1)


def explained(name: str, door: str = "torch.compile", lazy: bool = True, **settings: Any) -> Report:
    """The report on a zoo model, batch of two ragged rows."""
    return _explained(name, door, lazy, tuple(sorted({"new_tokens": TOKENS, **settings}.items())))


@cache
def _explained(name: str, door: str, lazy: bool, settings: tuple[tuple[str, Any], ...]) -> Report:
    zoo, model = get(name), zoo_model(name)
    plan = avl_fx.Plan.lazy([BLOCK]) if lazy else None
    run = None if zoo.hf else own_loop
    return avl_fx.explain(
        model, plan, front_door=door, run=run, keep_graphs=True, **dict(settings), **zoo.inputs(model, 2)
    )


def encodes_images_ahead(model: nn.Module) -> bool:
    """Whether `generate` encodes images before it calls the model: newer releases of transformers do, for some models.

    Otherwise the vision encoder runs within the forward, and is compiled along with it.
    """
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


@cache
def partitioned(name: str, door: str, plan: Plan, new_tokens: int = 5, **settings: Any) -> Report:
    """The report on a zoo model under a plan that partitions, batch of two ragged rows."""
    zoo, model = get(name), zoo_model(name)
    return avl_fx.explain(model, plan, front_door=door, new_tokens=new_tokens, **settings, **zoo.inputs(model, 2))


class Layer(nn.Module):
    """Attention over heads of 8, without a cache; `rank` 3 leaves the batch out of it, which is refused."""

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        self.rank = rank
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.rank == 3:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 * self.training, is_causal=True)
        return x + out.reshape(x.shape[0], 2, -1, 8).transpose(1, 2).flatten(2)


class Tiny(nn.Module):
    """Layers without a config or a generate; explained in a second."""

    def __init__(self, rank: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(rank) for _ in range(layers))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def tiny(rank: int = 4) -> Tiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny(rank).eval().requires_grad_(False)


def tiny_inputs(length: int = 5) -> dict[str, Tensor]:
    return {"x": torch.linspace(-1, 1, 2 * length * 16).view(2, length, 16)}


class GrowingLayer(Layer):
    """The same over a cache that grows by `cat`."""

    def forward(self, x: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + out.transpose(1, 2).flatten(2), [k, v]


class Growing(nn.Module):
    """All that partitioning needs, explained in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GrowingLayer() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, cached: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        stored: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            x, pair = layer(x, mask, cached[2 * number : 2 * number + 2])
            stored += pair
        return x, stored


def growing(
    plan: Plan,
    visual: Tensor,
    *,
    visible: Tensor | None = None,
    door: str = "torch.compile",
    steps: int = 4,
    told: Tensor | None = None,
    always: bool = False,
    between: Callable[[list[Tensor]], list[Tensor]] = lambda cached: cached,
) -> Report:
    """The report on `Growing`.

    Args:
        plan: what to explain.
        visual: bool ``[batch, prompt]``.
        visible: the same, False where the mask hides a key; default: all are seen.
        door: the front door.
        steps: decode steps.
        told: what `modality_ids` is given; default: ``visual``.
        always: whether it is given at decode steps as well, which lets them start late.
        between: what happens to the cache before each step.
    """
    batch, length = visual.shape
    seen = torch.ones_like(visual) if visible is None else visible

    def given() -> AbstractContextManager[None]:
        return nullcontext() if told is NOT_TOLD else avl_fx.modality_ids(visual if told is None else told)

    def run(model: nn.Module, x: Tensor) -> None:
        mask = seen[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
        with given():
            _, cached = model(x, mask | torch.eye(length, dtype=torch.bool), [])
        with given() if always else nullcontext():
            for step in range(steps):
                now = torch.cat([seen, torch.ones(batch, step + 1, dtype=torch.bool)], 1)
                _, cached = model(x[:, -1:], now[:, None, None], between(cached))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Growing().eval().requires_grad_(False)
    x = torch.linspace(-1, 1, batch * length * 16).view(batch, length, 16).sin()
    return avl_fx.explain(model, plan, front_door=door, run=run, x=x)


NOT_TOLD = torch.empty(0)
"""For `growing`: nobody says which positions are visual."""


def spans(*rows: str) -> Tensor:
    """Visual positions as drawn: ``spans("..##.", "####.")``."""
    return torch.tensor([[mark == "#" for mark in row] for row in rows])
