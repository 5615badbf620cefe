"""What the passes say about a graph: sites, reasons for leaving one alone, and what a pass returns."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

__all__ = ["PassResult", "Reason", "Site", "Status"]


class Status(enum.StrEnum):
    """Where a site ended."""

    FOUND = "found"
    """Canonical, and nothing in the plan asks for more: only un-repeated and lowered."""
    REWRITTEN = "rewritten"
    """A policy of the plan was applied."""
    REFUSED = "refused"
    """Left as the model wrote it, or dense where the plan asked for less, for a named reason."""


class Reason(enum.StrEnum):
    """Why a site, or a policy on a site, was refused. The value is what `explain` prints."""

    DROPOUT = "dropout is active"
    RANK = "query, key or value is not 4-dimensional"
    BROADCAST = "query, key and value do not share their batch size"
    HEADS = "head counts are symbolic or do not divide"
    DTYPE = "query, key and value differ in dtype"
    WEIGHTS_USED = "attention weights are used elsewhere"
    LOGITS = "logits are not query @ key with one scale and one mask"
    SOFTCAP = "logits are soft-capped"
    SINKS = "some attention weights are cut off (attention sinks)"
    SOFTMAX_DIM = "softmax is not over the keys"
    MASK = "mask cannot be carried exactly"
    FLEX = "flex_attention: its mask is a program"
    REGION = "in a region of the graph that is left as it is"
    LIBRARY = "runs in an operator that nobody here knows"
    MUTATION = "keys or values change between the site and its use"
    GRADIENT = "gradients would take another way"
    DEVICE = "no lowering for this device"
    LAYER_UNKNOWN = "decoder layer of the site is unknown"
    ANCHOR_ELSEWHERE = "its anchor is in another graph"
    ANCHOR_REFUSED = "its anchor is not a recognised site"
    ANCHOR_KIND = "attends differently from its anchor (full, sliding, chunked, cross)"
    ANCHOR_GEOMETRY = "heads, head dim or sequence differ from its anchor"
    ANCHOR_MASK = "mask differs from its anchor's"
    ANCHOR_KEYS = "another layer than its anchor reads its keys"
    ANCHOR_SCALE = "scale differs from its anchor's"
    NO_CACHE = "it keeps no cache"
    NOT_THE_CACHE = "does not attend to its cache as a whole"
    OTHER_PROCESSES = "its heads are spread over other processes than the first layer's"
    POSITION_MASK = "its mask depends on the order of the keys"
    COMPACT_ROWS = "its compact cache is read by more than attention"
    KEYS_ESCAPE = "its keys leave the graph in a way that is not a cache"
    VISUAL_UNKNOWN = "which positions are visual is not known"
    FILTER_CACHE = "its cache keeps every token, as an AVLCache does not"
    FILTER_LATER = "its cache holds tokens already"
    FILTER_LENGTH = "the length of the prompt is a constant of the graph"
    FILTER_SIZES = "the graph may not hold sizes that depend on data"
    FILTER_LAYERS = "layers behind the filter would need what it drops"
    FILTER_STREAM = "no single hidden state leads to the layers behind the filter"
    FILTER_GRAPH = "what stands behind the filter cannot run on fewer tokens"
    NEW_ROWS = "where its new keys enter the cache is not understood"


@dataclass
class Site:
    """One attention call in a graph: q, k, v, mask and scale, where k and v stand *before* `repeat_kv`.

    Shapes are ints or, where symbolic, strings such as ``"s53 + 1"``.
    """

    index: int
    style: str
    """``sdpa``, ``softmax`` (matmul, softmax, matmul), ``flex``, ``library`` (FlashAttention and others) or
    ``region`` (in a part of the graph behind one node)."""
    module_path: str | None = None
    module_class: str | None = None
    tower: str | None = None
    """Module path of the tower's layers, for instance ``model.language_model.layers``."""
    role: str = "unknown"
    """``decoder``, ``encoder`` (bidirectional, no cache; or of another part of the model), ``cross`` or ``unknown``
    (between others: what attends to something else than tokens)."""
    layer: int | None = None
    depth: int | None = None
    """Number of layers of the tower, where the model tells."""
    kind: str = "full"
    """``full``, ``sliding`` or ``cross``, as the model's own module declares it, or what its configuration calls it
    instead (``chunked``)."""
    batch: int | str = 0
    queries: int | str = 0
    keys: int | str = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    dtype: str = ""
    device: str = ""
    scale: float = 0.0
    mask: str = "none"
    """``none``, ``causal`` (a flag), ``bool`` or ``additive``."""
    cache: str = "none"
    """``none``, ``dynamic`` (cat), ``static`` (in-place write) or ``other``."""
    unrepeated: bool = False
    """The model repeated keys and values for its query heads; the canonical node reads them un-repeated."""
    latent: bool = False
    """Keys and values are made from latents that all heads share, which the cache stores instead."""
    status: Status = Status.FOUND
    reason: Reason | None = None
    detail: str = ""
    action: str = "dense"
    anchor: int | None = None
    """The layer that a lazy site inherits from."""
    inherits: str = "none"
    """Which logits it takes from its anchor: ``none``, ``all``, or ``visual``, those against visual keys."""
    visual: str = "none"
    """Where this site's visual key positions come from; see `locate_modalities`."""

    # Graph nodes; never serialised.
    node: fx.Node | None = field(default=None, repr=False)
    key_write: Any = field(default=None, repr=False)

    def refuse(self, reason: Reason, detail: str = "") -> None:
        """Record that this site (or the plan's policy on it) was left alone."""
        self.status, self.reason, self.detail = Status.REFUSED, reason, detail

    def to_dict(self) -> dict[str, Any]:
        """Plain data for reports."""
        nodes = {"node": self.node, "key_write": self.key_write}
        self.node = self.key_write = None
        try:
            data = asdict(self)
        finally:
            self.node, self.key_write = nodes["node"], nodes["key_write"]
        data.pop("node")
        data.pop("key_write")
        data["status"] = str(self.status)
        data["reason"] = None if self.reason is None else str(self.reason)
        return data


@dataclass
class PassResult:
    """What one pass did to one graph."""

    name: str
    count: int = 0
    """Sites that the pass rewrote (or, for an analysis, recognised)."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reason -> number of sites left alone."""
    dropped_mutations: tuple[str, ...] = ()
    """Names of in-place writes that the pass removed on purpose; any other loss fails the verifier."""
    added_mutations: tuple[str, ...] = ()
    """Names of in-place writes that the pass took out of a part of the graph where they did not show."""
    new_inputs: tuple[str, ...] = ()
    """Names of the inputs that the pass appended to the graph's."""
    seconds: float = 0.0

    def refuse(self, site: Site, reason: Reason, detail: str = "") -> None:
        """Refuse ``site`` and count the reason."""
        site.refuse(reason, detail)
        self.refused[str(reason)] += 1
