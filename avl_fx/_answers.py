"""Greedy answers of a contender to one batch, and how far its choices are from the dense model's."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from avl_fx import _compat
from avl_fx.contenders import Contender
from avl_fx.errors import EvaluationError
from avl_fx.savings import cache_bytes

__all__ = ["TOP", "Answers", "DenseAnswers", "answers", "dense_answers"]

TOP = 64
"""Tokens whose probabilities are compared one by one; all others count as one."""


@dataclass(frozen=True)
class DenseAnswers:
    """What the dense model answered to a batch, and how sure it was. On the CPU."""

    tokens: Tensor
    """int64 ``[rows, steps]``"""
    lengths: tuple[int, ...]
    """Tokens of each row that count: up to its end token, included."""
    top: Tensor
    """The `TOP` most likely tokens at each step: int64 ``[steps, rows, TOP]``."""
    log_probabilities: Tensor
    """Of these, float32."""
    cache_bytes: int
    step_seconds: float | None


@dataclass(frozen=True)
class Answers:
    """What a contender answered to a batch; one entry a row."""

    tokens: Tensor
    """int64 ``[rows, steps]``, on the CPU"""
    divergence: tuple[float, ...]
    """Mean Kullback-Leibler divergence from the dense model over the tokens of the dense answer (nats), each after the
    dense tokens before it. Over the `TOP` most likely tokens and the rest as one: never more than over all."""
    agreement: tuple[float, ...]
    """Share of the dense answer's tokens that it would choose as well, after the dense tokens before them."""
    cache_bytes: int
    """Of the cache at the end of the dense answer: its own one may be longer or shorter."""
    step_seconds: float | None
    """A decode step of its own answer: the median over means of `Contender.period` steps in a row, or the mean step
    where there are not so many. Left out are those that something was compiled in; ``None`` where none is left."""


def dense_answers(model: Any, contender: Contender, inputs: Mapping[str, Any], max_new_tokens: int) -> DenseAnswers:
    """Greedy answers of the model itself."""
    listener = _Listener()
    tokens, cache = _generate(model, contender, inputs, max_new_tokens, listener)
    lengths, top = _lengths(model, tokens), torch.stack(listener.top)
    return DenseAnswers(tokens, lengths, top, torch.stack(listener.found), cache, listener.step_seconds())


def answers(
    model: Any,
    contender: Contender,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    dense: DenseAnswers,
    prompt_only: Sequence[str] = (),
) -> Answers:
    """Greedy answers of ``contender``; and, where they differ from the dense ones, a second run along those.

    With ``prompt_only``, inputs that steps behind the prompt do without, the second run of a contender with a cache of
    its own begins behind the prompt, from a copy of that cache.
    """
    listener = _Listener(dense, keeps_prompt=bool(prompt_only) and "attention_mask" in inputs)
    tokens, cache = _generate(model, contender, inputs, max_new_tokens, listener)
    seconds = listener.step_seconds(contender.period)
    if any(tokens[row, :length].tolist() != dense.tokens[row, :length].tolist() for row, length in _rows(dense)):
        listener, cache = _along(model, contender, inputs, dense, prompt_only, listener)
    divergence, agreement = [], []
    for row, length in _rows(dense):
        terms = [_divergence(dense, listener, step, row) for step in range(length)]
        divergence.append(sum(terms) / length)
        agreement.append(
            sum(int(listener.chosen[step][row] == dense.tokens[row, step]) for step in range(length)) / length
        )
    return Answers(tokens, tuple(divergence), tuple(agreement), cache, seconds)


def _along(
    model: Any,
    contender: Contender,
    inputs: Mapping[str, Any],
    dense: DenseAnswers,
    prompt_only: Sequence[str],
    first: _Listener,
) -> tuple[_Listener, int]:
    """What ``contender`` thinks of every token of the dense answers, and the bytes of its cache behind them.

    ``first`` heard its own answers.
    """
    listener, steps = _Listener(dense, forced=True), dense.tokens.shape[1]
    if first.prompt is None:
        return listener, _generate(model, contender, inputs, steps, listener)[1]
    listener.found, listener.chosen = first.found[:1], first.chosen[:1]  # the prompt's: both say the same
    cache = cache_bytes(first.prompt)
    if steps > 1:
        said = dense.tokens[:, :1].to(inputs["input_ids"].device)

        @contextlib.contextmanager
        def behind_the_prompt(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
            with contender.around(model, inputs) as used:
                ids, mask = used["input_ids"], used["attention_mask"]
                longer = {
                    "input_ids": torch.cat([ids, said], dim=1),
                    "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
                }
                yield {name: value for name, value in used.items() if name not in prompt_only} | longer

        forked = replace(contender, around=behind_the_prompt, cache=lambda _: first.prompt)
        _, cache = _generate(model, forked, inputs, steps - 1, listener)
    return listener, cache


class _Listener:
    """Notes what the model thinks of the next token; with ``forced`` it then says what the dense model said."""

    def __init__(self, dense: DenseAnswers | None = None, forced: bool = False, keeps_prompt: bool = False) -> None:
        self.dense, self.forced, self.keeps_prompt = dense, forced, keeps_prompt
        self.top: list[Tensor] = []
        self.found: list[Tensor] = []
        """float32 ``[rows, TOP]`` a step."""
        self.chosen: list[Tensor] = []
        """int64 ``[rows]`` a step."""
        self.seconds: list[float | None] = []
        """From the end of one call to the beginning of the next: a decode step, without what is done here. ``None`` for
        steps that something was compiled in."""
        self.cache: Any = None
        """The contender's own, where it has one."""
        self.prompt: Any = None
        """With ``keeps_prompt``, a copy of it as it was behind the prompt."""
        self._left, self._compiled = 0.0, 0

    def step_seconds(self, period: int = 1) -> float | None:
        """The median over means of ``period`` steps in a row, or the mean step where there are not so many."""
        means: list[float] = []
        row: list[float] = []
        for seconds in self.seconds:
            row = [] if seconds is None else [*row, seconds]
            if len(row) == period:
                means.append(statistics.fmean(row))
                row = []
        timed = [seconds for seconds in self.seconds if seconds is not None]
        return statistics.median(means) if means else statistics.fmean(timed) if timed else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        arrived, compiled = time.perf_counter(), _compat.compilations()
        if self.found:
            self.seconds.append(arrived - self._left if compiled == self._compiled else None)
        elif self.keeps_prompt:
            self.prompt = copy.deepcopy(self.cache)
        said = self._hear(scores)
        self._left, self._compiled = time.perf_counter(), compiled
        return said

    def _hear(self, scores: Tensor) -> Tensor:
        step = len(self.found)
        probabilities = scores.float().log_softmax(-1)
        self.chosen.append(scores.argmax(-1).cpu())
        if self.dense is None:
            found, top = probabilities.topk(min(TOP, scores.shape[-1]), dim=-1)
            self.top.append(top.cpu())
        elif step < len(self.dense.top):
            found = probabilities.gather(-1, self.dense.top[step].to(scores.device))
        else:  # its own answer is longer
            found = probabilities[:, :1]
        self.found.append(found.cpu())
        if not self.forced:
            return scores
        assert self.dense is not None
        said = self.dense.tokens[:, step].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(-1, said[:, None], 0.0)


def _generate(
    model: Any, contender: Contender, inputs: Mapping[str, Any], max_new_tokens: int, listener: _Listener
) -> tuple[Tensor, int]:
    """New tokens int64 ``[rows, steps]`` on the CPU, and the bytes of the cache behind them."""
    from transformers import LogitsProcessorList

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "return_dict_in_generate": True,
        "logits_processor": LogitsProcessorList([listener]),
    }
    if contender.cache is not None:
        settings[_compat.cache_argument()] = listener.cache = contender.cache(model)
    with contender.around(model, inputs) as used:
        out = model.generate(**{**used, **settings})
    steps = len(listener.found)
    cache = _compat.cache_of(out)
    return out.sequences[:, out.sequences.shape[1] - steps :].cpu(), 0 if cache is None else cache_bytes(cache)


def _rows(dense: DenseAnswers) -> list[tuple[int, int]]:
    return list(enumerate(dense.lengths))


def _lengths(model: nn.Module, tokens: Tensor) -> tuple[int, ...]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    lengths = []
    for row in tokens.tolist():
        lengths.append(next((step + 1 for step, token in enumerate(row) if token in known), len(row)))
    return tuple(lengths)


def _divergence(dense: DenseAnswers, listener: _Listener, step: int, row: int) -> float:
    """KL over `TOP` tokens and the rest, nats."""
    p, q = dense.log_probabilities[step, row].double(), listener.found[step][row].double()
    if not torch.isfinite(q).any():
        raise EvaluationError(
            f"the logits of step {step} are not finite", field="model", remedy="check its dtype and the plan"
        )
    rest = [(1 - part.exp().sum()).clamp_min(1e-12) for part in (p, q)]
    kept = torch.isfinite(p)
    terms = p[kept].exp() * (p[kept] - q[kept].clamp_min(-700))
    return max(0.0, (terms.sum() + rest[0] * (rest[0] / rest[1]).log()).item())
