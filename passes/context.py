"""What the passes may know besides the graph: the plan, and a way from names in the graph to the model's modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from avl_fx.passes.site import Site
from avl_fx.plan import Plan

__all__ = ["DroppedKeys", "PassContext", "VisualSource"]


@dataclass(frozen=True)
class DroppedKeys:
    """The keys of one lazy layer, which the rewritten graph neither computes nor stores.

    Exactly one of ``output`` and ``placeholder`` is set. ``output``: position in the graph's outputs where the model
    returned its keys (a DynamicCache, or a cache of the model's own); the rewritten graph returns nothing there and
    the runtime puts a marker of the same shape. ``placeholder``: position of the in-place buffer (StaticCache).
    """

    layer: int
    head_dim: int
    output: int | None = None
    like_output: int | None = None
    """Position of the layer's values in the outputs: same batch, heads and length as the dropped keys."""
    placeholder: int | None = None


@dataclass(frozen=True)
class VisualSource:
    """Where a graph's row-wise visual positions come from."""

    how: str
    """``discovered`` in this graph, ``carried`` from an earlier graph, or ``given`` by the user or the hook."""
    node: fx.Node | None
    """A boolean mask ``[batch, sequence]`` in the graph; ``None`` unless discovered."""


@dataclass
class PassContext:
    """Everything that one graph's pipeline shares. Made by the backend, one a graph."""

    plan: Plan
    resolve_module: Callable[[str], torch.nn.Module | None] = lambda path: None
    """Module behind a path of Dynamo's ``nn_module_stack``, where it can still be reached."""
    expected_layers: int | None = None
    """Depth of the model's decoder, where the model tells."""
    decoder_modules: frozenset[torch.nn.Module] = frozenset()
    """Modules of the language decoder, where the model names it: evidence for a decoder that is not causal."""
    sites: list[Site] = field(default_factory=list)
    dropped_keys: list[DroppedKeys] = field(default_factory=list)
    visual: VisualSource | None = None
    carried_visual: str | None = None
    """``carried`` or ``given`` when visual positions come with the graph's inputs."""
    initially_unused: frozenset[fx.Node] = frozenset()

    def keep(self) -> tuple[fx.Node, ...]:
        """Nodes without users that a later stage needs."""
        return () if self.visual is None or self.visual.node is None else (self.visual.node,)
