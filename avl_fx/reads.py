"""What a decode step reads of a partitioned cache, by formula: rows of the cache, before any layer's shape comes in.

For one batch row let N be its visual keys, n its text keys behind the first visual one when the prompt ended (neither
visual nor padding), and t = 1, 2, ... the decode steps since. A step finds m = n + t - 1 such text keys and stores one
more, which it reads. It leaves out

    visual   N - int(core * N), or N - int(secondary * N) at every refresh-th step
    text     m - min(m, max(round(budget * m), minimum)), in batch rows with a visual key

and reads everything else. So a cache of a prompt of p keys, which a dense step reads as p + t rows, grows under a text
window by `budget` rows a token in the long run, and by one a token without a window. A static cache counts whole, p + t
being the length of its buffer: that is what dense attention reads, too.

Assumed: padding stands in front of the first visual key, as transformers pads to generate (what a mask hides behind it
counts as read, although a text window may leave it out); one token is stored at each step; the state of the cache is
not lost on the way (beams, cropping, copying), which makes a step dense.

"Read" is what the key ranges of `avl::partitioned_decode` name, each row once. Rows that the mask hides count, although
kernels may pass over them. The Triton kernel goes over the keys once more at steps that want softmax rows: refreshes,
and every step under a text window. Not counted: masks, the rows that a refresh exchanges (at most twice the smaller of
core and of secondary without core), and the copy of a cache that does not grow in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from avl_fx.policies import TextPolicy, VisionPolicy

__all__ = ["PromptRow", "mean_over_period", "reads_secondary", "rows_read", "text_kept", "visual_kept"]


@dataclass(frozen=True)
class PromptRow:
    """One batch row of a cache as it was partitioned, counted when the prompt ended."""

    visual: int
    """Visual keys: N."""
    text: int
    """Text keys behind the first visual one: n. Counted under a text window only, else 0."""


def visual_kept(visual: int, share: float) -> int:
    """Visual keys that are core or secondary: ``int(share * visual)``."""
    return int(share * visual)


def text_kept(text: int, policy: TextPolicy | None) -> int:
    """How many of ``text`` keys behind the first visual one stay: ``min(text, max(round(budget * text), minimum))``."""
    return text if policy is None else min(text, max(round(policy.budget * text), policy.minimum))


def reads_secondary(step: int, policy: VisionPolicy | None) -> bool:
    """Whether decode step ``step`` (1, 2, ...) reads secondary instead of core alone."""
    return policy is None or policy.refresh == 0 or step % policy.refresh == 0


def rows_read(
    row: PromptRow,
    keys: int,
    step: int,
    vision: VisionPolicy | None,
    text: TextPolicy | None,
    secondary: bool | None = None,
) -> int:
    """Cache rows that decode step ``step`` reads for one batch row; see the module for formula and assumptions.

    Args:
        row: counts at the end of the prompt.
        keys: rows that a dense step would read, the step's own among them.
        step: decode steps since the prompt, this one included.
        vision, text: the plan's sections; ``None`` leaves nothing out.
        secondary: whether secondary is read; by default what `reads_secondary` says.
    """
    if secondary is None:
        secondary = reads_secondary(step, vision)
    if vision is not None:
        keys -= row.visual - visual_kept(row.visual, vision.secondary if secondary else vision.core)
    if row.visual:
        before = row.text + step - 1
        keys -= before - text_kept(before, text)
    return keys


def mean_over_period(core: float, secondary: float, policy: VisionPolicy | None) -> float:
    """The average step between refreshes: ``core`` at all of them but one, ``secondary`` at that one."""
    if policy is None or policy.refresh == 0:
        return secondary
    return ((policy.refresh - 1) * core + secondary) / policy.refresh
