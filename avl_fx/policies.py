"""The sections of a plan, one for each method. Immutable; each checks itself."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from avl_fx._frozen import FrozenModel
from avl_fx._messages import show
from avl_fx.errors import PlanError

__all__ = ["LazyPolicy", "PrefillFilter", "TextPolicy", "VisionPolicy"]

Block = tuple[int, int]
Ratio = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


def _pairs(value: object) -> object:
    """Lists as tuples (JSON knows lists only, and strict tuples take none), and every block a pair."""
    if not isinstance(value, list | tuple):
        return value
    for index, block in enumerate(value):
        if not isinstance(block, list | tuple) or len(block) != 2:
            raise PlanError(
                f"must be a pair of layers, got {show(block)}",
                field=f"blocks[{index}]",
                remedy="write each block as (first, last), for example (4, 12)",
            )
    return tuple(map(tuple, value))


def _sorted_blocks(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    for index, (first, last) in enumerate(blocks):
        field = f"blocks[{index}]"
        if first < 0:
            raise PlanError(
                f"({first}, {last}) starts before layer 0", field=field, remedy="count decoder layers from 0"
            )
        if last <= first:
            raise PlanError(
                f"({first}, {last}) has no lazy layer: the last layer must come after the first, which is the anchor",
                field=field,
                remedy=f"write ({last}, {first}), or drop the block" if last < first else "drop it or make it longer",
            )
        for other, (start, end) in enumerate(blocks[:index]):
            if first <= end and start <= last:
                raise PlanError(
                    f"({first}, {last}) overlaps blocks[{other}] = ({start}, {end})",
                    field=field,
                    remedy=f"merge them into ({min(first, start)}, {max(last, end)}), or move one of them",
                )
    return tuple(sorted(blocks))


class LazyPolicy(FrozenModel):
    """Blocks of decoder layers whose later layers inherit from the first (Q Cache, arXiv 2602.01901).

    Layers count from 0 within the language decoder; both ends of a block belong to it. What a lazy layer inherits:

    ``gla``: queries and keys; its own are neither computed nor stored.
    ``vla``: queries and keys at visual positions.
    ``vla_scores``: logits against visual keys; one softmax covers these and its own against text.
    """

    blocks: Annotated[tuple[Block, ...], BeforeValidator(_pairs), AfterValidator(_sorted_blocks)] = Field(
        description="pairs (first, last) of decoder layers, such as [[4, 12], [20, 30]]; first is the anchor"
    )
    mode: Literal["gla", "vla", "vla_scores"] = Field(default="gla", description="'gla', 'vla' or 'vla_scores'")

    def anchor_of(self, layer: int) -> int | None:
        """The layer that `layer` inherits from; ``None`` when it is not lazy (anchors are not)."""
        return next((first for first, last in self.blocks if first < layer <= last), None)

    def is_lazy(self, layer: int) -> bool:
        """Whether `layer` inherits from an anchor."""
        return self.anchor_of(layer) is not None

    @property
    def anchors(self) -> tuple[int, ...]:
        """The first layer of every block, ascending."""
        return tuple(first for first, _ in self.blocks)

    @property
    def lazy_layers(self) -> tuple[int, ...]:
        """All layers that inherit, ascending."""
        return tuple(layer for first, last in self.blocks for layer in range(first + 1, last + 1))

    @property
    def is_identity(self) -> bool:
        return not self.blocks

    def __str__(self) -> str:
        return f"{self.mode} {', '.join(f'{first}..{last}' for first, last in self.blocks) or 'without blocks'}"


class VisionPolicy(FrozenModel):
    """Which visual keys decode attends to (A-VL, arXiv 2409.14846). Shares are relative to a row's visual tokens."""

    core: Ratio = Field(
        default=0.3, description="the share of visual keys computed at every step, 0 < core <= secondary"
    )
    secondary: Ratio = Field(default=0.5, description="the share of visual keys kept, core <= secondary <= 1")
    refresh: int = Field(
        default=3, ge=0, description="the steps from one refresh to the next, 0 to compute secondary always"
    )
    scoring_window: int = Field(
        default=1, ge=1, description="the number of last prefill queries that score, at least 1"
    )
    scores: Literal["shared", "per_kv_head"] = Field(default="shared", description="'shared' or 'per_kv_head'")
    spread: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="the share of secondary that is spread over the images whatever its scores, 0 to 1",
    )

    @model_validator(mode="after")
    def _core_within_secondary(self) -> Self:
        if self.core > self.secondary:
            raise PlanError(
                f"core is a subset of secondary, but {self.core} > {self.secondary}",
                field="core",
                remedy=f"use core <= {self.secondary}, or secondary >= {self.core}",
            )
        return self

    @property
    def is_identity(self) -> bool:
        return self.core == 1 or (self.secondary == 1 and self.refresh <= 1)

    def __str__(self) -> str:
        beside = self.departures("scoring_window", "scores", "spread")
        return f"core {self.core:g}, secondary {self.secondary:g}, refresh {self.refresh}{beside}"


class TextPolicy(FrozenModel):
    """How much of the text after the first visual span stays in the cache (A-VL, arXiv 2409.14846)."""

    budget: Ratio = Field(default=0.6, description="the share of text keys kept, 0 < budget <= 1")
    minimum: int = Field(default=20, ge=0, description="the number of text keys never undercut, 0 or more")
    decay: Literal["forgetting", "none"] = Field(default="forgetting", description="'forgetting' or 'none'")

    @property
    def is_identity(self) -> bool:
        return self.budget == 1

    def __str__(self) -> str:
        return f"budget {self.budget:g}{self.departures('minimum', 'decay')}"


class PrefillFilter(FrozenModel):
    """Visual tokens dropped during prefill, after one decoder layer (A-VL, arXiv 2409.14846)."""

    after_layer: int = Field(
        default=2, ge=0, description="the decoder layer, counted from 0, after which tokens are dropped"
    )
    keep: Ratio = Field(
        default=0.5, description="the share of visual tokens that later layers see, secondary <= keep <= 1"
    )

    @property
    def is_identity(self) -> bool:
        return self.keep == 1

    def __str__(self) -> str:
        return f"keep {self.keep:g} after layer {self.after_layer}"
