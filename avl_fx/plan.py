"""The plan: the immutable, serialisable choice of policies for one model.

A plan says *what* may be left out, never how. It is JSON on disk, `Plan` in Python, and every mistake in it is a
`PlanError` that names the field and the remedy.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from avl_fx._frozen import FrozenModel, section
from avl_fx._messages import near_miss, quote, show
from avl_fx._planfile import parse_json, plans_beside, read_text, reason
from avl_fx.errors import PlanError, PlanFileError, PlanMismatchError, UnsupportedPlanError
from avl_fx.policies import LazyPolicy, PrefillFilter, TextPolicy, VisionPolicy

__all__ = ["EXECUTED", "PRESETS", "LazyPolicy", "Plan", "PlanSpec", "PrefillFilter", "TextPolicy", "VisionPolicy"]

EXECUTED: Mapping[str, frozenset[str] | None] = {
    "lazy": frozenset({"gla", "vla", "vla_scores"}),
    "vision": None,
    "text": None,
    "prefill": None,
}
"""What this version executes besides identity plans: section -> its modes (``None``: the whole section).

`Plan.check_supported` refuses everything else; extend this table when a pass learns to execute more.
"""


LATER: Mapping[str, Mapping[str, object]] = {"vision": {"spread": 0.0}}
"""Section -> settings that plans did not have from the beginning, and what says the same as leaving them out."""


def _version_one(value: object) -> object:
    # Not left to `Literal`: it compares by equality, so 1.0 and True would pass.
    if type(value) is not int or value != 1:
        raise PlanError(
            f"this version of avl_fx reads plans of version 1, got {show(value)}",
            field="version",
            remedy="upgrade avl_fx for a newer plan, or write 1",
        )
    return value


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PlanError(
            "cannot be written as UTF-8", field="description", remedy="remove the unpaired surrogate characters"
        ) from None
    return text


class Plan(FrozenModel):
    """The policies for one model. Absent sections leave the model as it is; the empty plan is the identity.

    In JSON and as keywords the sections are ``lazy``, ``vision``, ``text`` and ``prefill``; as attributes
    ``lazy_policy``, ``vision_policy``, ``text_policy`` and ``prefill_policy``.
    """

    version: Annotated[Literal[1], BeforeValidator(_version_one)] = Field(default=1, description="1")
    num_layers: int | None = Field(
        default=None, ge=1, description="the number of decoder layers of the model, at least 1"
    )
    lazy_policy: Annotated[LazyPolicy | None, section("lazy", LazyPolicy)] = Field(
        default=None, alias="lazy", description='an object such as {"blocks": [[4, 12]], "mode": "gla"}'
    )
    vision_policy: Annotated[VisionPolicy | None, section("vision", VisionPolicy)] = Field(
        default=None, alias="vision", description='an object such as {"core": 0.3, "secondary": 0.5}'
    )
    text_policy: Annotated[TextPolicy | None, section("text", TextPolicy)] = Field(
        default=None, alias="text", description='an object such as {"budget": 0.6}'
    )
    prefill_policy: Annotated[PrefillFilter | None, section("prefill", PrefillFilter)] = Field(
        default=None, alias="prefill", description='an object such as {"after_layer": 2, "keep": 0.5}'
    )
    description: Annotated[str, AfterValidator(_encodable)] = Field(default="", description="free text, for people")

    SECTIONS: ClassVar[tuple[str, ...]] = ("lazy", "vision", "text", "prefill")

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.num_layers is not None:
            self._check_within(self.num_layers, PlanError)
        vision, prefill = self.vision_policy, self.prefill_policy
        if vision is not None and prefill is not None and prefill.keep < vision.secondary:
            raise PlanError(
                f"must keep the secondary set, but {prefill.keep} < vision.secondary = {vision.secondary}",
                field="prefill.keep",
                remedy=f"use keep >= {vision.secondary}, or a smaller vision.secondary",
            )
        return self

    # ---- presets -------------------------------------------------------------------------------------------------

    @classmethod
    def identity(cls) -> Self:
        """The plan that changes nothing a user can see."""
        return cls()

    @classmethod
    def lazy(
        cls,
        blocks: Sequence[Sequence[int]],
        mode: Literal["gla", "vla", "vla_scores"] = "gla",
        num_layers: int | None = None,
        *,
        description: str = "",
    ) -> Self:
        """Lazy blocks alone.

        Args:
            blocks: pairs (first, last) of decoder layers counted from 0, both inclusive; the first is the anchor.
            mode: what lazy layers inherit, see `LazyPolicy`.
            num_layers: decoder layers of the model the blocks were chosen for; checked before the plan is used.
            description: free text.

        Raises:
            PlanError: a block is empty, overlaps another, or leaves the model.
        """
        sections = {"lazy": {"blocks": blocks, "mode": mode}}
        return cls.from_dict({**sections, "num_layers": num_layers, "description": description})

    @classmethod
    def avl(
        cls,
        core: float = 0.3,
        secondary: float = 0.5,
        refresh: int = 3,
        text: float | None = 0.6,
        *,
        scoring_window: int = 1,
        scores: Literal["shared", "per_kv_head"] = "shared",
        spread: float = 0.0,
        text_minimum: int = 20,
        decay: Literal["forgetting", "none"] = "forgetting",
        prefill: float | None = None,
        prefill_after_layer: int = 2,
        num_layers: int | None = None,
        description: str = "",
    ) -> Self:
        """Adaptive attention over visual and text keys (A-VL), with the published defaults.

        Args:
            core, secondary: shares of the visual keys, 0 < core <= secondary <= 1.
            refresh: decode steps from one refresh to the next; 0 computes the secondary set at every step.
            text: share of the text keys kept; ``None`` or 1.0 keeps all of them.
            scoring_window: last prefill queries that score the visual keys; the paper takes one. Those behind the
                images know what is asked for: better where that is one thing (docs/results.md).
            scores: one ranking of the visual keys for all heads, or one per KV head.
            spread: share of secondary that is spread evenly over the images, in each layer elsewhere, instead of
                chosen by its scores. The paper spreads nothing (0.0). Where all of a picture is asked for, as in a
                description, 0.5 loses less (docs/results.md).
            text_minimum: text keys never undercut.
            decay: how text scores age.
            prefill: share of the visual tokens kept during prefill; ``None`` keeps all of them.
            prefill_after_layer: decoder layer, counted from 0, after which they are dropped.
            num_layers: decoder layers of the model; checked before the plan is used.
            description: free text.

        Raises:
            PlanError: a value is out of range.
        """
        vision = {
            "core": core,
            "secondary": secondary,
            "refresh": refresh,
            "scoring_window": scoring_window,
            "scores": scores,
            "spread": spread,
        }
        keep_text = text is None or (type(text) in (int, float) and text == 1)
        return cls.from_dict(
            {
                "num_layers": num_layers,
                "vision": vision,
                "text": None if keep_text else {"budget": text, "minimum": text_minimum, "decay": decay},
                "prefill": None if prefill is None else {"after_layer": prefill_after_layer, "keep": prefill},
                "description": description,
            }
        )

    def combine(self, other: "Plan") -> "Plan":
        """Both plans at once.

        Raises:
            PlanError: both hold the same section with different settings.
            PlanMismatchError: they were made for different numbers of layers.
        """
        merged: dict[str, Any] = {}
        for name in self.SECTIONS:
            mine, theirs = self.section(name), other.section(name)
            if mine is not None and theirs is not None and mine != theirs:
                raise PlanError(
                    f"both plans set it: {mine} and {theirs}", field=name, remedy="drop it from one of them"
                )
            merged[name] = theirs if mine is None else mine
        if None not in (self.num_layers, other.num_layers) and self.num_layers != other.num_layers:
            raise PlanMismatchError(
                f"one plan is for {self.num_layers} layers, the other for {other.num_layers}",
                field="num_layers",
                remedy="combine plans for the same model",
            )
        notes = dict.fromkeys(note for note in (self.description, other.description) if note)
        return Plan(
            **merged,
            num_layers=other.num_layers if self.num_layers is None else self.num_layers,
            description="; ".join(notes),
        )

    # ---- questions -----------------------------------------------------------------------------------------------

    def section(self, name: str) -> LazyPolicy | VisionPolicy | TextPolicy | PrefillFilter | None:
        """The section called `name` in JSON (one of `SECTIONS`), ``None`` when the plan has none."""
        policy: LazyPolicy | VisionPolicy | TextPolicy | PrefillFilter | None = getattr(self, f"{name}_policy")
        return policy

    @property
    def text_window(self) -> TextPolicy | None:
        """The section ``text``, where it leaves anything out."""
        policy = self.text_policy
        return None if policy is None or policy.is_identity else policy

    @property
    def reads_less(self) -> bool:
        """Whether decode steps leave out keys: a section ``vision`` or ``text`` says so."""
        return self.text_window is not None or not (self.vision_policy is None or self.vision_policy.is_identity)

    @property
    def filters_prompts(self) -> bool:
        """Whether a prompt drops visual tokens on the way: a section ``prefill`` says so."""
        return self.prefill_policy is not None and not self.prefill_policy.is_identity

    @property
    def inherits_scores(self) -> bool:
        """Whether lazy layers inherit logits against visual keys: mode ``vla_scores``."""
        policy = self.lazy_policy
        return policy is not None and policy.mode == "vla_scores" and not policy.is_identity

    @property
    def spares_visual_keys(self) -> bool:
        """Whether lazy layers need keys of their own, but not at visual positions: modes ``vla`` and ``vla_scores``."""
        policy = self.lazy_policy
        return policy is not None and policy.mode != "gla" and not policy.is_identity

    @property
    def asks_for_positions(self) -> bool:
        """Whether something depends on which tokens are visual: everything but lazy layers in mode ``gla`` does."""
        return self.reads_less or self.filters_prompts or self.spares_visual_keys

    @property
    def tracks_visual(self) -> bool:
        """Whether steps depend on which rows of the cache are visual, or text that has left."""
        return self.reads_less or self.inherits_scores

    @property
    def is_identity(self) -> bool:
        return not any(True for _ in self._active())

    @property
    def is_lossless(self) -> bool:
        """True when every key is computed and stays in the cache: any later step could still be dense.

        Steps may read fewer keys all the same, so the outputs can differ from the untouched model's.
        """
        return all(name == "vision" and policy.secondary == 1 for name, policy in self._active())

    def fingerprint(self) -> str:
        """32 hex digits that depend on the settings alone (not on `description`); stable across processes.

        And across versions: a setting that came later (`LATER`) does not count where it changes nothing.
        """
        settings = self._plain()
        settings.pop("description", None)
        for name, defaults in LATER.items():
            own = settings.get(name, {})
            for setting, default in defaults.items():
                if own.get(setting) == default:
                    del own[setting]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]

    def check_depth(self, num_layers: int) -> None:
        """Check that the plan fits a decoder of `num_layers` layers.

        Raises:
            PlanMismatchError: it was made for another depth, or names layers that the model does not have.
        """
        if self.num_layers is not None and self.num_layers != num_layers:
            raise PlanMismatchError(
                f"the plan is for {self.num_layers} decoder layers, the model has {num_layers}",
                field="num_layers",
                remedy="use a plan that was made for this model",
            )
        self._check_within(num_layers, PlanMismatchError)

    def check_supported(self) -> None:
        """Check that this version of avl_fx executes the plan (table `EXECUTED`).

        Raises:
            UnsupportedPlanError: names the first section that it does not, or the one that another forbids.
        """
        able = ", ".join(
            name if modes is None else f"{name} (mode {' or '.join(sorted(modes))})" for name, modes in EXECUTED.items()
        )
        for name, policy in self._active():
            modes = EXECUTED.get(name, frozenset())
            mode = getattr(policy, "mode", None)
            if modes is None or mode in modes:
                continue
            field, has, remedy = name, f"the section {name!r}", f"remove {name!r}"
            if modes:
                field, has, remedy = f"{name}.mode", f"mode {mode!r}", f"use mode {' or '.join(sorted(modes))}"
            raise UnsupportedPlanError(
                f"this version of avl_fx executes only identity plans, {able}; the plan is valid, but has {has}",
                field=field,
                remedy=remedy,
            )
        if self.filters_prompts:
            self._check_filter()

    def _check_filter(self) -> None:
        """What is dropped behind one layer has no keys in later ones: no step may read it there."""
        after, keep = self.prefill_policy.after_layer, self.prefill_policy.keep  # type: ignore[union-attr]
        if self.vision_policy is None:
            raise UnsupportedPlanError(
                "dropped visual tokens have no keys in later layers, so decode steps may not read them, and nothing "
                "says which ones they read",
                field="prefill",
                remedy=f"add a section 'vision' with secondary <= {keep:g}",
            )
        for index, (first, last) in enumerate(self.lazy_policy.blocks if self.lazy_policy else ()):
            if first <= after < last:
                before = f" or {first - 1}" if first else ""
                raise UnsupportedPlanError(
                    f"the lazy layers behind layer {after} would read keys that their anchor, layer {first}, has and "
                    f"they have not (lazy.blocks[{index}] = ({first}, {last}))",
                    field="prefill.after_layer",
                    remedy=f"filter after layer {last}{before}, or end the block at {after}",
                )

    # ---- files ---------------------------------------------------------------------------------------------------

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The plan as JSON text, also written to `path` (UTF-8) when one is given.

        Raises:
            PlanFileError: the file cannot be written.
        """
        text = json.dumps(self._plain(), indent=2, ensure_ascii=False)
        # One block a line. Text cannot match: JSON strings hold no raw line break.
        text = re.sub(r"\[\n\s+(\d+),\n\s+(\d+)\n\s+\]", r"[\1, \2]", text) + "\n"
        if path is not None:
            try:
                Path(os.path.expanduser(path)).write_text(text, encoding="utf-8")
            except (OSError, ValueError) as error:
                raise PlanFileError(
                    f"cannot write the plan to {quote(path)}: {reason(error)}",
                    remedy="name a file in an existing folder that you may write to",
                    path=str(path),
                ) from error
        return text

    @classmethod
    def from_json(cls, path_or_text: str | os.PathLike[str]) -> Self:
        """Read a plan from a JSON file, or from JSON text (a string that starts with ``{`` or ``[``).

        Raises:
            PlanFileError: no such file, not UTF-8, empty, or not JSON (names line and column).
            PlanError: JSON, but not a valid plan.
        """
        if isinstance(path_or_text, str) and path_or_text.lstrip().startswith(("{", "[")):
            return cls.from_dict(parse_json(path_or_text, None))
        if not isinstance(path_or_text, str | os.PathLike):
            raise PlanError(
                f"a plan is read from a path or from JSON text, got {show(path_or_text)}",
                field="plan",
                remedy="pass a str or os.PathLike; Plan.from_dict takes parsed data",
            )
        path = os.fsdecode(path_or_text)
        data = parse_json(read_text(path), path)
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{error.message} (in {quote(path)})", field=error.field, remedy=error.remedy) from None

    @classmethod
    def resolve(cls, spec: "PlanSpec") -> "Plan":
        """Make a plan of whatever a user may pass as one.

        Args:
            spec: a `Plan`, its plain data, the path of a JSON file, the name of a preset, or ``None`` (the identity).
                A preset wins over a file of the same name; write ``./name`` for the file.

        Raises:
            PlanFileError: a path that cannot be read.
            PlanError: anything else that is not a plan.
        """
        if isinstance(spec, Plan):
            return spec
        if spec is None:
            return cls.identity()
        if isinstance(spec, Mapping):
            return cls.from_dict(spec)
        if isinstance(spec, os.PathLike):
            return cls.from_json(spec)
        if not isinstance(spec, str):
            raise PlanError(
                f"must be a Plan, a dict, a path or the name of a preset, got {show(spec)}",
                field="plan",
                remedy='pass for example "plan.json" or Plan.identity()',
            )
        if spec in PRESETS:
            return PRESETS[spec]()
        if spec.lstrip().startswith(("{", "[")) or os.path.exists(os.path.expanduser(spec)):
            return cls.from_json(spec)
        meant = near_miss(spec, [*PRESETS, *plans_beside(spec)])
        raise PlanFileError(
            f"{quote(spec)} is neither a preset ({', '.join(PRESETS)}) nor an existing file (looked for "
            f"{quote(os.path.abspath(os.path.expanduser(spec)))})",
            field="plan",
            remedy="check the path" if meant is None else f"did you mean {meant!r}?",
            path=spec,
        )

    # ---- internals -----------------------------------------------------------------------------------------------

    def _active(self) -> Iterator[tuple[str, Any]]:
        """Sections that change something."""
        for name in self.SECTIONS:
            policy = self.section(name)
            if policy is not None and not policy.is_identity:
                yield name, policy

    def _plain(self) -> dict[str, Any]:
        plain = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return plain if plain["description"] else {k: v for k, v in plain.items() if k != "description"}

    def _check_within(self, num_layers: int, error: type[PlanError]) -> None:
        for index, (first, last) in enumerate(self.lazy_policy.blocks if self.lazy_policy else ()):
            if last >= num_layers:
                raise error(
                    f"({first}, {last}) leaves the model: {num_layers} decoder layers are 0..{num_layers - 1}",
                    field=f"lazy.blocks[{index}]",
                    remedy=f"end the block at {num_layers - 1} or earlier, or correct num_layers",
                )
        if self.prefill_policy is not None and self.prefill_policy.after_layer >= num_layers - 1:
            raise error(
                f"no layer follows layer {self.prefill_policy.after_layer}: the decoder has {num_layers}",
                field="prefill.after_layer",
                remedy="filter after an earlier layer",
            )

    def __str__(self) -> str:
        parts = [f"{name}: {self.section(name)}" for name in self.SECTIONS if self.section(name) is not None]
        depth = [] if self.num_layers is None else [f"{self.num_layers} layers"]
        return f"Plan({'; '.join((parts or ['identity']) + depth)})"

    __repr__ = __str__


PlanSpec = Plan | Mapping[str, Any] | str | os.PathLike[str] | None
"""Whatever `Plan.resolve` accepts."""

PRESETS: Mapping[str, Callable[[], Plan]] = {"identity": Plan.identity}
"""Plans that go by name, as in ``options={"plan": "identity"}``."""
