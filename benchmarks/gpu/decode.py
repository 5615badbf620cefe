"""Whole decode steps of a model whose cache is filled at random."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import avl_fx
from benchmarks._decoding import PLAN, REFRESH, TEXT, filled, mean_share, periods, read_bytes, visual_positions
from benchmarks.gpu.contenders import CONTENDERS, Contender, Forward
from benchmarks.gpu.exact import float32_copy, oracle
from benchmarks.gpu.gate import Reference, both, verdict
from benchmarks.gpu.probe import Probe
from benchmarks.gpu.settings import Cell, Settings
from benchmarks.gpu.shapes import shape
from benchmarks.gpu.timing import Stopwatch, deciles

__all__ = ["DecodeBench"]

WARM_UP = 2 * REFRESH + 1
"""Compilation (a step without room, one with; a CUDA graph is recorded at the second call), the start of a partition
and a refresh; a multiple of the period, and the step that starts the partition."""
EXACT_STEPS = WARM_UP + 2 * REFRESH
"""Steps of the run in float32."""


class DecodeBench:
    """One cell: the model, the tokens that everybody is given, and what the logits of some rows have to be."""

    def __init__(self, cell: Cell, settings: Settings) -> None:
        self.settings, self.batch, self.shape = settings, cell.batch, shape(cell.model)
        self.model = self.shape.make(settings.layers, settings.torch_dtype, settings.device)
        self.stopwatch = Stopwatch(settings.device)
        self.steps = WARM_UP + settings.steps
        self.rows = sorted({0, cell.batch - 1})
        """The first and the last: those at both ends of every buffer. Rows do not depend on one another."""
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randint(10, self.shape.vocabulary, (self.steps, cell.batch, 1), generator=generator)
        self.tokens = drawn.to(settings.device)
        self.references = self._references()

    def facts(self) -> dict[str, Any]:
        """What every contender of this cell meets."""
        return {
            "prompt": self.shape.visual + TEXT,
            "visual": self.shape.visual,
            "layers": self.settings.layers,
            "of_layers": self.shape.layers,
            "gate_rows": self.rows,
            "gate_steps": self.steps,
            "bytes": {
                "dense": round(read_bytes(self.model, self.batch, self.shape.visual, 1.0)),
                "partitioned": round(read_bytes(self.model, self.batch, self.shape.visual, mean_share(PLAN))),
            },
        }

    @staticmethod
    def names() -> list[str]:
        """Who takes part."""
        return [name for name, contender in CONTENDERS.items() if "decode" in contender.phases]

    def measure(self, name: str) -> dict[str, Any]:
        """Time and verdict of one contender."""
        contender = CONTENDERS[name]
        forward = contender.make(self.model, self.settings)
        cache = filled(self.model, contender.cache, self.batch, self.shape.visual, self.steps)
        seconds, logits = [], []
        start = time.perf_counter()
        with Probe(self.settings.device) as probe, contender.attending(self.model):
            for took, out in self._steps(forward, cache, self.tokens):
                seconds.append(took)
                logits.append(out[self.rows].float())
                if len(seconds) == WARM_UP:
                    probe.warmed_up(time.perf_counter() - start)
        timed = seconds[WARM_UP:]
        # The first call is dense and starts the partition; every third from there on is a refresh.
        refreshes = [took for step, took in enumerate(seconds) if step >= WARM_UP and step % REFRESH == 0]
        others = [took for step, took in enumerate(seconds) if step >= WARM_UP and step % REFRESH != 0]
        return {
            "gate": self._gate(contender, torch.stack(logits)),
            "ms": deciles(periods(timed)),
            "refresh_steps_ms": deciles(refreshes)["median"],
            "other_steps_ms": deciles(others)["median"],
            "bytes": round(read_bytes(self.model, self.batch, self.shape.visual, mean_share(contender.plan))),
            **probe.facts(),
        }

    def _gate(self, contender: Contender, logits: Tensor) -> dict[str, Any]:
        dtype = self.settings.torch_dtype
        reference = self.references["partitioned" if contender.partitioned else "dense"]
        if not contender.partitioned or dtype == torch.float32:
            return verdict(logits, reference, dtype)
        torch._dynamo.reset()
        exact_model = float32_copy(self.model)
        forward = contender.make(exact_model, self.settings)
        cache = filled(exact_model, contender.cache, self.batch, self.shape.visual, self.steps, drawn=dtype)
        with contender.attending(exact_model):
            steps = self._steps(forward, cache, self.tokens[:EXACT_STEPS])
            found = torch.stack([out[self.rows].float() for _, out in steps])
        first, dense = reference.exact[:EXACT_STEPS], reference.dense
        assert dense is not None
        exactly = verdict(found, Reference(reference.against, first, first, dense[:EXACT_STEPS]), torch.float32)
        return both(exactly, verdict(logits, replace(reference, dense=None), dtype))

    def _steps(self, forward: Forward, cache: Any, tokens: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Seconds, and logits ``[batch, vocabulary]``, of each step."""
        batch, length, device = tokens.shape[1], self.shape.visual + TEXT, self.settings.device
        with torch.no_grad(), avl_fx.modality_ids(visual_positions(batch, self.shape.visual, device)):
            for step, token in enumerate(tokens):
                position = torch.full((batch, 1), length + step, device=device)
                torch.compiler.cudagraph_mark_step_begin()
                took, out = self.stopwatch.time(
                    lambda token=token, position=position: forward(
                        input_ids=token, position_ids=position, past_key_values=cache, use_cache=True
                    )
                )
                yield took, out.logits[:, -1]

    def _references(self) -> dict[str, Reference]:
        rows, visual = self.rows, self.shape.visual
        tokens = self.tokens[:, rows]

        def run(model: Any) -> Tensor:
            cache = filled(model, "dynamic", self.batch, visual, self.steps, rows, self.settings.torch_dtype)
            return torch.stack([out.float() for _, out in self._steps(model.forward, cache, tokens)])

        exact_model = float32_copy(self.model)
        with sdpa_kernel(SDPBackend.MATH):
            exact = run(exact_model)
        with oracle(exact_model, rows, visual):
            exact_oracle = run(exact_model)
        del exact_model
        plain = run(self.model)
        with oracle(self.model, rows, visual):
            plain_oracle = run(self.model)
        return {
            "dense": Reference("stock eager model, float32", exact, plain),
            "partitioned": Reference(
                "the tests' oracle on the eager model, float32", exact_oracle, plain_oracle, exact
            ),
        }
