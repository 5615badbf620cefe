"""`evaluate`: what plans cost in answers, on your model and your questions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avl_fx import _compat
from avl_fx._answers import DenseAnswers, answers, dense_answers
from avl_fx._findings import fingerprint
from avl_fx._journal import Journal
from avl_fx._messages import quote, show, unknown_name_remedy
from avl_fx._progress import progress_bar
from avl_fx._untouched import left_untouched
from avl_fx.contenders import Contender
from avl_fx.errors import EvaluationError
from avl_fx.evaluation_report import DENSE, EvaluationReport, Row
from avl_fx.metrics import METRICS
from avl_fx.plan import PlanSpec

__all__ = ["EvaluationBatch", "EvaluationTask", "evaluate"]


@dataclass(frozen=True)
class EvaluationBatch:
    """Some prompts that are answered together."""

    inputs: Mapping[str, Any]
    """What ``model.generate`` takes; padded on the left."""
    references: Sequence[str]
    """What should be answered, one a row."""
    groups: Sequence[Hashable] | None = None
    """What rows depend on each other, such as the picture that they ask about: see `mean_interval`."""


@dataclass(frozen=True)
class EvaluationTask:
    """Prompts, and how their answers are judged."""

    batches: Sequence[EvaluationBatch]
    """May make its batches when they are asked for; they must be the same each time."""
    decode: Callable[[Tensor], Sequence[str]]
    """New tokens int64 ``[rows, steps]`` (padding and end tokens included) to text, such as
    ``functools.partial(tokenizer.batch_decode, skip_special_tokens=True)``."""
    metric: str = "exact"
    """One of ``avl_fx.metrics.METRICS``: ``exact``, ``anls``, ``rouge_l``, ``clauses``."""
    max_new_tokens: int = 32
    name: str = "answers"
    prompt_only: Sequence[str] = ()
    """Inputs that decode steps do without, such as ``["pixel_values"]``. Where they are named (and there is an
    ``attention_mask``), what contenders on caches of their own (``compact=True``) make of the dense answer is found
    without another prompt, which halves the time. Not for models that keep something besides the cache between prompt
    and steps (Qwen-VL: ``rope_deltas``)."""


def evaluate(
    model: nn.Module,
    task: EvaluationTask,
    contenders: Mapping[str, PlanSpec | Contender],
    *,
    compiler: str = "eager",
    compact: bool = False,
    output: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> EvaluationReport:
    """Let ``model`` answer ``task`` as it is and as every contender, and compare.

    ::

        task = EvaluationTask(batches, functools.partial(tokenizer.batch_decode, skip_special_tokens=True))
        print(avl_fx.evaluate(model, task, {"half": Plan.avl(core=0.5, secondary=1.0), "lazy": "plan.json"}))

    Answers are greedy. The dense model comes first and is called ``dense``. For every contender: the score of its
    answers against the references and its difference to the dense score, both with 95% bootstrap intervals; how often
    its answer is the dense one; how far its choices are from the dense model's along the dense answer (`Answers`);
    bytes of its KV cache; what a decode step takes, refreshes included, which says something of compiled
    contenders on an idle machine alone.
    The model is left exactly as it was.

    Args:
        model: one with ``generate``.
        task: prompts and how answers are judged.
        contenders: by name, plans (a `Plan`, its data, a path or a preset name) or `Contender`s.
        compiler: what compiles the graphs of plans; the default generates no code.
        compact: run plans on an `AVLCache`.
        output: folder for ``answers.jsonl``, ``evaluation.json``, ``evaluation.md`` and ``evaluation.png``. Starting
            again with it goes on behind the last batch that was answered.
        limit: batches to answer at most.
        seed: of the intervals.
        progress: show a bar on stderr, where that is a terminal.

    Raises:
        EvaluationError: nothing to compare, a wrong task, or a folder that holds another evaluation.
        PlanError, OptionError: a plan or ``compiler`` is wrong.

    Whatever the model or the batches raise is passed on.
    """
    model = _compat.uncompiled(model)
    _check(model, task, contenders, limit)
    ways = {
        name: way if isinstance(way, Contender) else Contender.of_plan(way, compiler=compiler, compact=compact)
        for name, way in contenders.items()
    }
    folder = None if output is None else Path(os.path.expanduser(output))
    count = len(task.batches) if limit is None else min(limit, len(task.batches))
    journal = Journal(None if folder is None else folder / "answers.jsonl", _mark(model, task))
    metric = METRICS[task.metric]
    with left_untouched(model), torch.no_grad(), progress_bar("evaluating", progress, count * (1 + len(ways))) as step:
        run = _Run(model, task, journal)
        dense_way = Contender(DENSE)
        for number in range(count):
            run.dense(dense_way, number)
            step()
        for way in ways.values():
            with way.prepare(model):
                for number in range(count):
                    run.answer(way, number)
                    step()
    rows: dict[str, list[Row]] = {}
    for name, way in {DENSE: dense_way, **ways}.items():
        records = [journal.records[run.key(way, number)] for number in range(count)]
        rows[name] = [Row.of(answer, metric) for record in records for answer in record]
    report = EvaluationReport.of(task.name, task.metric, rows, {n: w.budget for n, w in ways.items()}, seed)
    if folder is not None:
        report.dump(folder)
    return report


class _Run:
    """Answers of one model, recorded batch by batch."""

    def __init__(self, model: nn.Module, task: EvaluationTask, journal: Journal) -> None:
        self.model, self.task, self.journal = model, task, journal
        self.traces: dict[int, DenseAnswers] = {}

    def key(self, way: Contender, number: int) -> str:
        return f"{way.identity} {number}"

    def dense(self, way: Contender, number: int) -> DenseAnswers:
        """What the model itself answers. Not in the journal is how sure it was: a run that goes on asks it again."""
        batch = self.batch(number)
        if number not in self.traces:
            trace = dense_answers(self.model, way, batch.inputs, self.task.max_new_tokens)
            self.traces[number] = trace
            known = self.journal.records.get(self.key(way, number))
            if known is None:
                rows = len(batch.references)
                self.record(way, number, batch, trace.tokens, (0.0,) * rows, (1.0,) * rows, trace)
            elif [answer["reference"] for answer in known] != list(batch.references):
                raise EvaluationError(
                    f"{quote(self.journal.path)} holds answers to other questions",
                    field=f"task.batches[{number}]",
                    remedy="name another folder, or delete the file to start anew",
                )
        return self.traces[number]

    def answer(self, way: Contender, number: int) -> None:
        if self.key(way, number) in self.journal.records:
            return
        batch, trace = self.batch(number), self.traces[number]
        said = answers(self.model, way, batch.inputs, self.task.max_new_tokens, trace, self.task.prompt_only)
        self.record(way, number, batch, said.tokens, said.divergence, said.agreement, said)

    def record(
        self,
        way: Contender,
        number: int,
        batch: EvaluationBatch,
        tokens: Tensor,
        divergence: Sequence[float],
        agreement: Sequence[float],
        held: Any,
    ) -> None:
        texts = [text.strip() for text in self.task.decode(tokens)]
        rows = len(batch.references)
        if len(texts) != rows or len(tokens) != rows:
            raise EvaluationError(
                f"{rows} references, {len(tokens)} rows generated, {len(texts)} answers decoded",
                field=f"task.batches[{number}]",
                remedy="give one reference a row, and decode every row",
            )
        groups = batch.groups if batch.groups is not None else [f"{number}.{row}" for row in range(rows)]
        self.journal.add(
            self.key(way, number),
            [
                {
                    "said": texts[row],
                    "reference": batch.references[row],
                    "group": str(groups[row]),
                    "divergence": divergence[row],
                    "agreement": agreement[row],
                    "kv_bytes": held.cache_bytes / rows,
                    "step_seconds": held.step_seconds,
                }
                for row in range(rows)
            ],
        )

    def batch(self, number: int) -> EvaluationBatch:
        batch = self.task.batches[number]
        if not isinstance(batch, EvaluationBatch):
            raise EvaluationError(
                f"must be an EvaluationBatch, got {show(batch)}",
                field=f"task.batches[{number}]",
                remedy="give EvaluationBatch(inputs, references)",
            )
        if not batch.references or (batch.groups is not None and len(batch.groups) != len(batch.references)):
            raise EvaluationError(
                f"{len(batch.references)} references, {len(batch.groups or [])} groups",
                field=f"task.batches[{number}]",
                remedy="give one reference, and one group if any, for every row",
            )
        return batch


def _check(model: Any, task: object, contenders: Mapping[str, Any], limit: int | None) -> None:
    if not isinstance(model, nn.Module) or not callable(getattr(model, "generate", None)):
        raise EvaluationError(
            f"must be a model with generate(), got {show(model)}", field="model", remedy="pass a transformers model"
        )
    if not isinstance(task, EvaluationTask):
        raise EvaluationError(
            f"must be an EvaluationTask, got {show(task)}", field="task", remedy="EvaluationTask(batches, decode)"
        )
    if task.metric not in METRICS:
        raise EvaluationError(
            f"unknown metric {quote(task.metric)}",
            field="task.metric",
            remedy=unknown_name_remedy(task.metric, METRICS),
        )
    if task.max_new_tokens < 1:
        raise EvaluationError(
            f"must be at least 1, got {task.max_new_tokens}",
            field="task.max_new_tokens",
            remedy="give a positive number",
        )
    if limit is not None and limit < 1:
        raise EvaluationError(f"must be at least 1, got {limit}", field="limit", remedy="give a positive number")
    if len(task.batches) == 0:
        raise EvaluationError("there are no batches", field="task.batches", remedy="give at least one")
    identities = [way.identity for way in contenders.values() if isinstance(way, Contender)]
    if DENSE in identities or len(set(identities)) < len(identities):
        raise EvaluationError(
            f"the identities must differ from each other and from {DENSE!r}, got {identities}",
            field="contenders",
            remedy="give each Contender an identity of its own",
        )
    if DENSE in contenders:
        raise EvaluationError(
            f"{DENSE!r} is the model as it is", field=f"contenders[{DENSE!r}]", remedy="choose another name"
        )


def _mark(model: nn.Module, task: EvaluationTask) -> str:
    """What the answers depend on, besides the batches and who answers."""
    known = json.dumps([fingerprint(model, ""), task.name, task.max_new_tokens])
    return hashlib.sha256(known.encode()).hexdigest()[:32]
