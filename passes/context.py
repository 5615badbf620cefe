"""What the passes may know besides the graph: the plan, and a way from names in the graph to the model's modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from avl_fx.passes.site import Site
from avl_fx.plan import Plan

__all__ = [
    "CachedTensor",
    "CompactRows",
    "DroppedKeys",
    "GrowingTensor",
    "KeyRanges",
    "ObservedAttention",
    "ObservedLayer",
    "PartitionIO",
    "PartitionedLayer",
    "PassContext",
    "PromptFilter",
    "StoredTensor",
    "VisualInputs",
    "VisualSource",
]


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
    dtype: torch.dtype | None = None
    """That of the dropped keys; under autocast it may be another than that of the values."""
    placeholder: int | None = None


@dataclass(frozen=True)
class VisualSource:
    """Where a graph's row-wise visual positions come from."""

    how: str
    """``discovered`` in this graph, ``carried`` from an earlier graph, or ``given`` by the user or the hook."""
    node: fx.Node | None
    """A boolean mask ``[batch, sequence]`` in the graph; ``None`` unless discovered."""


Size = int | tuple[int, int | None]
"""A size of a graph's inputs: a number, or the position of an input that has it, and which of its dimensions (``None``:
the input is the number)."""


@dataclass
class VisualInputs:
    """The inputs of a graph that say which positions are visual; each int64 ``[batch, MAX_SEGMENTS, 2]``, ranges as
    (start, length)."""

    batch: Size | None
    queries: Size | None
    starts: bool
    """Whether no cache was there before."""
    new: fx.Node | None = None
    """Of this forward's positions, counted from its first; ``None`` where the graph itself shows all, or nobody asks.
    """
    shown: bool = False
    """Whether the graph shows some itself: ``new`` then names those that an earlier graph of the forward showed."""
    past: fx.Node | None = None
    """Of the keys that were in the cache before."""
    flags: fx.Node | None = None
    """This forward's visual positions in the graph, bool ``[batch, queries]``."""


@dataclass(frozen=True)
class CachedTensor:
    """Where the runtime finds a cache tensor: ``before`` a call among the inputs, ``after`` it among the outputs.

    Only ``before``: a buffer written in place (StaticCache), the same tensor after the call. Only ``after``: a cache
    that this graph starts.
    """

    before: int | None = None
    after: int | None = None


@dataclass(frozen=True)
class GrowingTensor:
    """A cache tensor that a decode step makes one row longer, in the spare capacity of its buffer.

    The model returned ``cat([past, new])``; the rewritten graph returns nothing there, and the runtime puts the longer
    view.
    """

    before: int
    """Position of the past rows among the graph's inputs."""
    output: int
    """Position of the longer tensor among the model's outputs."""


@dataclass(frozen=True)
class KeyRanges:
    """The inputs of a decode graph that say what it reads."""

    segments: fx.Node
    """int64 ``[batch, MAX_SEGMENTS, 2]``"""
    weigh: fx.Node
    """int32 ``[1]``"""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a compact cache, as a graph takes it."""

    before: int
    """Position of its rows among the graph's inputs."""
    length: int
    """Tokens fed so far; where ``symbolic``, the position of that number among the inputs."""
    symbolic: bool
    complete: bool
    """Whether the graph asks for a row for every token, whatever the state of the cache is."""


@dataclass
class CompactRows:
    """How a graph that appends to a compact cache and the runtime meet."""

    plans: set[str] = field(default_factory=set)
    """Fingerprints of the plans that the caches were made for."""
    stored: list[StoredTensor] = field(default_factory=list)
    columns: fx.Node | None = None
    """An input of the graph, int64 ``[batch, rows]``: the column of the model's mask for each stored row, ``-1`` for a
    row that a batch row has not."""
    key_rows: fx.Node | None = None
    """An input of the graph, int64 ``[batch, rows]``: where a lazy layer's own keys have each stored row, ``-1`` for a
    visual one that it takes from its anchor."""
    short: dict[int, Site] = field(default_factory=dict)
    """Input positions of keys that may lack such rows, and the site that can do without."""
    spread: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """What stands for the keys of such an input where a graph wants all rows -> the input."""


@dataclass
class PartitionedLayer:
    """One decoder layer whose cache rows the runtime keeps partitioned."""

    layer: int
    scores_from: int
    """The layer whose scores decide: itself, or the anchor of its lazy block."""
    key: CachedTensor | None
    """``None``: a lazy layer, which reads its anchor's keys."""
    value: CachedTensor | None
    """``None``: a layer that has no cache and reads keys and values of an earlier one."""
    weights: fx.Node | None = None
    """Scores (prompt) or softmax rows (decode), float32 ``[batch, kv_heads, keys]``; ``None`` where nothing is decided.
    """
    scored: bool = False
    """Whether the graph returns `weights`."""
    keyless: bool = False
    """A lazy layer that takes from its anchor what it needs of visual keys: a compact cache stores none for it."""

    @property
    def cached(self) -> tuple[CachedTensor, ...]:
        """Keys and values, where it has its own."""
        return tuple(tensor for tensor in (self.key, self.value) if tensor is not None)

    @property
    def decides(self) -> bool:
        """Whether which keys matter is decided here; a lazy layer follows its anchor."""
        return self.scores_from == self.layer


@dataclass
class PartitionIO:
    """How one graph and the runtime of `partition_modalities` meet."""

    decode: bool
    """One query: the graph takes `KeyRanges`. Otherwise it is dense and only scores."""
    layers: list[PartitionedLayer]
    compact: bool = False
    """The cache is one of ours, which does not store what is left out."""
    positions: fx.Node | None = None
    """Key positions of the queries, in a static cache; int64 ``[queries]``."""
    last_mask: fx.Node | None = None
    """The mask of the last query, ``[batch, heads or 1, keys]`` boolean or additive; none: it sees every key."""
    weight: int | None = None
    """Position of the input with the weight that makes the first layer's values: tells whose cache it is."""
    process_group: str | None = None
    """Under tensor parallelism the group that has the other heads, for each process ranks keys by all of them."""
    left: fx.Node | None = None
    """Of a prompt that drops visual tokens on its way: those that are left, bool ``[batch, left]``; False fills up."""

    def returned(self) -> list[fx.Node]:
        """What the graph returns beyond the model's own outputs, in this order."""
        weights = [layer.weights for layer in self.layers]
        return [n for n in (*weights, self.positions, self.last_mask, self.left) if n is not None]


@dataclass(frozen=True)
class PromptFilter:
    """How a graph that drops visual tokens on the way and the runtime meet."""

    keep: float
    """The share of them that stays."""
    left: Any
    """The symbol of how many positions are left."""


@dataclass
class ObservedLayer:
    """One decoder layer whose last attention row a graph returns."""

    layer: int
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    """Numbers a token that each key/value head stores: what a lazy layer would not, and what it would."""
    dtype: str
    linears: int
    """Linear layers of the graph that make nothing but this layer's query and key: what a lazy layer does without."""
    rows: fx.Node | None = None
    """float32 ``[batch, heads, keys]``"""


@dataclass
class ObservedAttention:
    """How one graph and the runtime of `observe_attention` meet."""

    layers: list[ObservedLayer]
    excluded: dict[int, str]
    """Layer -> why its attention is not observed. Layers of cross-attention are among them."""
    apart: dict[tuple[int, int], str]
    """``(earlier, later)`` layer -> why the later one cannot inherit from the earlier one."""
    depth: int | None
    """Decoder layers of the model, where it tells."""
    cross: bool
    """Whether images come in through cross-attention: the other layers' keys are then those of text."""
    positions: fx.Node | None = None
    """Key positions of the queries, in a static cache; int64 ``[queries]``."""
    process_group: str | None = None
    """Under tensor parallelism the group that has the other heads."""

    def returned(self) -> list[fx.Node]:
        """What the graph returns beyond the model's own outputs, in this order."""
        return [n for n in (*(layer.rows for layer in self.layers), self.positions) if n is not None]


@dataclass
class PassContext:
    """Everything that one graph's pipeline shares. Made by the backend, one a graph."""

    plan: Plan
    resolve_module: Callable[[str], torch.nn.Module | None] = lambda path: None
    """Module behind a path of Dynamo's ``nn_module_stack``, where it can still be reached."""
    expected_layers: int | None = None
    """Depth of the model's decoder, where the model tells."""
    without_attention: frozenset[int] = frozenset()
    """Its layers that do something else, where the model tells."""
    decoder_modules: frozenset[torch.nn.Module] | None = None
    """Modules of the language decoder, where the model names it; empty: this is no part of it. ``None``: unknown."""
    sites: list[Site] = field(default_factory=list)
    dropped_keys: list[DroppedKeys] = field(default_factory=list)
    visual: VisualSource | None = None
    carried_visual: str | None = None
    """``carried`` or ``given`` when visual positions come with the graph's inputs."""
    audio_ids: frozenset[int] = frozenset()
    """Ids of tokens that stand for audio, where the model tells: what is spliced in there is not visual."""
    audio_masks: frozenset[int] = frozenset()
    """Input positions of masks that an earlier graph of the same forward made of them."""
    returned_audio_masks: tuple[int, ...] = ()
    """Positions of such masks among the model's outputs."""
    observe: bool = False
    """Whether prompts return their last attention rows: somebody calibrates."""
    observed: ObservedAttention | None = None
    compact: CompactRows | None = None
    partition: PartitionIO | None = None
    ranges: KeyRanges | None = None
    visual_inputs: VisualInputs | None = None
    prompt_filter: PromptFilter | None = None
    spare_rows: bool = True
    """Whether rows may be stored behind the end of an input; not where inputs are copied first (CUDA graphs)."""
    growing: list[GrowingTensor] = field(default_factory=list)
    reserve: list[int] = field(default_factory=list)
    """Output positions of cache tensors that a prompt starts: the runtime gives them spare capacity."""
    adopt: list[GrowingTensor] = field(default_factory=list)
    """Caches that this decode graph copies for want of room."""
    initially_unused: frozenset[fx.Node] = frozenset()

    @property
    def tracks_visual(self) -> bool:
        """Whether the runtime has to know which rows of the cache are visual."""
        return self.plan.tracks_visual or (self.compact is not None and self.plan.spares_visual_keys)

    def emptied(self) -> list[int]:
        """Output positions where the rewritten graph returns nothing and the runtime puts something; ascending."""
        dropped = [d.output for d in self.dropped_keys if d.output is not None and d.like_output is not None]
        return sorted(dropped + [g.output for g in self.growing])

    def keep(self) -> tuple[fx.Node, ...]:
        """Nodes without users that a later stage needs: they are returned beyond the model's own outputs."""
        return tuple(self.returned())

    def returned(self) -> list[fx.Node]:
        """What the graph returns beyond the model's own outputs, in order."""
        visual = [] if self.visual is None or self.visual.node is None else [self.visual.node]
        partition = [] if self.partition is None else self.partition.returned()
        return visual + partition + ([] if self.observed is None else self.observed.returned())
