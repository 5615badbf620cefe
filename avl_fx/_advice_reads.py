"""Advice for plans with a section ``vision`` or ``text``: why decode steps read more than one might think."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from avl_fx._words import WHOLE, count, kib, percent
from avl_fx.partition import MOST_RANGES
from avl_fx.record import Undivided

if TYPE_CHECKING:
    from avl_fx._advice import Facts

__all__ = ["READS_RULES", "how_to_name_them"]

LITTLE = 0.05
"""Share of the bytes of a decode step below which a plan is said to gain little."""


def how_to_name_them(facts: Facts) -> str:
    """What a user does about visual positions that nobody knows."""
    name = "name them: with avl_fx.modality_ids(ids): model.generate(...), where ids [batch, sequence] are 0 at text"
    return name if facts.front_door == "avl_fx.compile" else f"use {WHOLE}, or {name}"


def _undivided(facts: Facts) -> Iterator[str]:
    if facts.reads is None or facts.reads.undivided is None:
        return
    text = facts.plan.text_policy
    remedies = {
        Undivided.UNKNOWN: f"No visual positions were found. If the prompt has images, {how_to_name_them(facts)}.",
        Undivided.NO_VISUAL: "The inputs hold no visual tokens: explain the plan with a prompt that has images.",
        Undivided.MISFIT: "The visual positions do not fit the cache: give [batch, sequence] of the whole prompt.",
        Undivided.HIDDEN: "The attention mask hides visual keys of the prompt: unmask them, or drop them from it.",
        Undivided.BIASED: "The attention mask weighs keys by their place (ALiBi): rows may not move.",
        Undivided.RANGES: (
            f"In a batch row visual tokens stand in so many pieces that more than {MOST_RANGES} ranges of keys would "
            "have to be read: use fewer or smaller images"
            + (", or a plan with text=None, which needs fewer ranges." if text is not None else ".")
        ),
        Undivided.TRAINING: "Gradients are recorded, and then no rows are moved: run under torch.no_grad().",
    }
    yield f"{remedies[Undivided(facts.reads.undivided)]} Until then every step reads every key, which is exact."


def _lost(facts: Facts) -> Iterator[str]:
    """Only where the cache was partitioned: without that, the rule before says why."""
    reads = facts.reads
    if reads is None or reads.undivided is not None or "all" not in reads.steps:
        return
    steps = count(sum(reads.steps.values()), "decode step")
    yield (
        f"{reads.steps['all']} of {steps} read every key: the cache was copied, cropped, reordered (beams) or written "
        "by others, and nobody knows any more what lies where. That is exact, and saves nothing."
    )


def _empty_core(facts: Facts) -> Iterator[str]:
    reads, vision = facts.reads, facts.plan.vision_policy
    if reads is None or vision is None:
        return
    split = vision.refresh > 1
    name, share = ("core", vision.core) if split else ("secondary", vision.secondary)
    for number, row in enumerate(reads.rows):
        if row.visual_tokens and (row.core_tokens if split else row.secondary_tokens) == 0:
            sees = "only refreshes see them" if split and row.secondary_tokens else "no decode step sees them"
            visual = row.visual_tokens
            which = f"of which int({share:g} * {visual}) = 0 are {name}"
            yield f"Batch row {number} has {count(visual, 'visual token')}, {which}: {sees}. Use a larger {name}."
            return  # one row is enough to see the point


def _little(facts: Facts) -> Iterator[str]:
    reads, vision = facts.reads, facts.plan.vision_policy
    if reads is None or reads.total is None or vision is None or vision.is_identity:
        return
    dense, mean = reads.total.dense.kv_bytes, reads.total.mean.kv_bytes
    if dense - mean >= LITTLE * dense:
        return
    visual = sum(row.visual_tokens for row in reads.rows)
    yield (
        f"Little is gained: the average step reads {percent(dense - mean, dense)} less. Visual tokens are "
        f"{percent(visual, reads.keys * len(reads.rows))} of the keys; longer visual spans or a smaller core gain more."
    )


def _idle_text(facts: Facts) -> Iterator[str]:
    reads, text = facts.reads, facts.plan.text_policy
    if reads is None or text is None:
        return
    windows = [row for row in reads.rows if row.text_tokens is not None]
    if windows and all(row.text_tokens == row.text_tokens_read for row in windows):
        longest = count(max(row.text_tokens or 0 for row in windows), "text token")
        yield (
            f"The text window leaves out nothing yet: behind the first visual token stand {longest} at most, and it "
            f"reads {percent(text.budget, 1)} of them, but at least {text.minimum}."
        )


def _copying(facts: Facts) -> Iterator[str]:
    text, reads, kv = facts.plan.text_policy, facts.reads, facts.kv
    if text is None or text.is_identity or reads is None or not reads.steps or facts.grows_in_place:
        return
    if kv is not None and kv.kind == "dynamic":
        yield (
            f"Under a text window a growing cache is copied at each step ({kib(kv.dense)} at the end of this run), and "
            "not extended in place. Use cache_implementation='static', or a plan with text=None."
        )


READS_RULES: Sequence[Callable[[Facts], Iterator[str]]] = (
    _undivided,
    _lost,
    _empty_core,
    _little,
    _idle_text,
    _copying,
)
"""The most important first."""
