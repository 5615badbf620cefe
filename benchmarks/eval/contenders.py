"""What is compared: both papers' methods at several budgets, both together, and every control at the same budgets."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from avl_fx import Contender, Plan
from benchmarks.eval.controls import CONTROLS, control, down_sampled, other_pictures
from benchmarks.eval.prompts import LATE, Prompts, stock_cache
from benchmarks.eval.tuned import with_weights_of
from examples.petite_vlm.lazy_layers import PREFIX, random_blocks
from examples.petite_vlm.model import trained_under

__all__ = ["WAYS", "Blocks", "ablations", "contenders", "kept_to_compute", "partitioned"]

CORE_OF_SECONDARY = 0.6
"""A-VL computes so much of what it keeps at steps that do not refresh (0.3 of 0.5 in the paper)."""
NEVER = 1_000_000
"""Steps from one refresh to the next that no answer reaches."""
WHOLE_PROMPT = 1_000_000
"""More rows than any prompt has."""
WAYS: dict[str, dict[str, Any]] = {
    "A-VL": {},
    f"A-VL, {LATE} rows": {"scoring_window": LATE},
    "A-VL, spread": {"spread": 0.5},
}
"""A-VL as published, and what else its settings can do."""
MODES = ("gla", "vla", "vla_scores")

Blocks = Sequence[tuple[int, int]]


def partitioned(share: float, **settings: Any) -> Plan:
    """A-VL that keeps a share of the visual keys, with other settings of `Plan.avl` than the paper's.

    Text is whole, so that it is compared at its treatment of images.
    """
    core = CORE_OF_SECONDARY * share
    return Plan.avl(core=core, secondary=share, refresh=3, text=None, **settings)


def kept_to_compute(share: float) -> float:
    """What A-VL keeps to compute so many of the visual keys between refreshes: as many as a control that keeps them."""
    return share / CORE_OF_SECONDARY


def contenders(
    shares: Sequence[float], blocks: Sequence[Blocks], layers: int, compiler: str, tuned: Path | None = None
) -> dict[str, Contender]:
    """By name, in the order of the table.

    Args:
        shares: of the visual keys, for A-VL and for the controls.
        blocks: of lazy layers, for each plan; those that save most come first, and are compared with random ones too.
        layers: decoder layers of the model.
        compiler: for plans.
        tuned: an adapter that was trained under lazy plans.
    """
    # On caches that store no more than the plan needs: the bytes of the table are real.
    plan = functools.partial(Contender.of_plan, compiler=compiler, compact=True)
    prompts = Prompts(PREFIX)
    found: dict[str, Contender] = {}
    for share in shares:
        for kept in (share, kept_to_compute(share)):
            if kept <= max(shares):
                found |= {f"{way} {kept:.0%}": plan(partitioned(kept, **own)) for way, own in WAYS.items()}
        for name in CONTROLS:
            found[f"{name} {share:.0%}"] = control(name, share, prompts)
        found[f"down-sampled {share:.0%}"] = down_sampled(share)
    for own in blocks:
        policy = Plan.lazy(own, num_layers=layers).lazy_policy
        assert policy is not None
        lazy = f"lazy {len(policy.lazy_layers)}"
        for mode in MODES:
            found[f"{lazy}, {mode}"] = plan(Plan.lazy(own, mode, num_layers=layers))  # type: ignore[arg-type]
        if own is blocks[0]:
            drawn = Plan.lazy(random_blocks(layers, len(policy.lazy_layers), seed=0), num_layers=layers)
            found[f"{lazy}, gla, random blocks"] = plan(drawn)
        together = partitioned(max(shares)).combine(Plan.lazy(own, "vla_scores", num_layers=layers))
        found[f"A-VL {max(shares):.0%} and {lazy}, vla_scores"] = plan(together)
    if tuned is not None:
        found |= _tuned(tuned, max(shares), compiler)
    found["other pictures"] = other_pictures()
    return found


def _tuned(adapter: Path, share: float, compiler: str) -> dict[str, Contender]:
    """The weights that were trained under lazy plans: under each of these, with A-VL on top, dense, and not looking."""
    found = {"tuned, dense": Contender("dense again", cache=stock_cache)}
    for number, plan in enumerate(trained_under(adapter)):
        policy = plan.lazy_policy
        assert policy is not None
        name = f"tuned lazy {len(policy.lazy_layers)}, {policy.mode}"
        found[name] = lazy = Contender.of_plan(plan, compiler=compiler, compact=True)
        together = partitioned(share).combine(plan)
        found[f"A-VL {share:.0%} and {name}"] = Contender.of_plan(together, compiler=compiler, compact=True)
        if not number:
            floor = other_pictures()
            identity = f"{lazy.identity} {floor.identity}"
            found[f"{name}, other pictures"] = replace(lazy, identity=identity, around=floor.around)
    return {name: with_weights_of(adapter, contender) for name, contender in found.items()}


def ablations(share: float, blocks: Blocks, layers: int, compiler: str) -> dict[str, Contender]:
    """A-VL at one budget, one setting changed at a time; the first is what all others are compared with."""
    base = {"core": CORE_OF_SECONDARY * share, "secondary": share, "refresh": 3, "text": None}
    changed = {
        f"A-VL {share:.0%}, refresh every 3rd step": {},
        "refresh at every step": {"refresh": 1},
        "refresh every 6th step": {"refresh": 6},
        "never refreshed": {"refresh": NEVER},
        "secondary at every step": {"refresh": 0},
        "scored by the last 8 rows": {"scoring_window": 8},
        "scored by the last 32 rows": {"scoring_window": 32},
        "scored by the whole prompt": {"scoring_window": WHOLE_PROMPT},
        "a quarter of secondary spread": {"spread": 0.25},
        "half of secondary spread": {"spread": 0.5},
        "half of secondary spread, secondary at every step": {"spread": 0.5, "refresh": 0},
        "all of secondary spread": {"spread": 1.0},
        "scored by the last 8 rows, half spread": {"scoring_window": 8, "spread": 0.5},
        "scores for each KV head": {"scores": "per_kv_head"},
        "scored by the last 32 rows, for each KV head": {"scoring_window": 32, "scores": "per_kv_head"},
        "half of the visual tokens dropped behind layer 2": {"prefill": max(0.5, share)},
        "text 60%, forgetting": {"text": 0.6},
        "text 60%, H2O": {"text": 0.6, "decay": "none"},
        "text 30%, forgetting": {"text": 0.3},
        "text 30%, H2O": {"text": 0.3, "decay": "none"},
    }
    plans = {name: Plan.avl(**(base | settings)) for name, settings in changed.items()}  # type: ignore[arg-type]
    if blocks:
        whole = Plan.avl(**base)  # type: ignore[arg-type]
        for mode in MODES:
            lazy = Plan.lazy(blocks, mode, num_layers=layers)  # type: ignore[arg-type]
            plans[f"core chosen by block, {mode}"] = whole.combine(lazy)
    return {name: Contender.of_plan(plan, compiler=compiler, compact=True) for name, plan in plans.items()}
