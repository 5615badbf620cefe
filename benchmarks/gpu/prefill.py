"""Whole prompts: what it takes until the first token, the start of the partition included.

LLaVA shapes take pixels through a small vision encoder, so the visual positions are discovered as in the full model.
The Qwen shape takes embeddings and is told where they are visual: its encoder loops over windows, and compiling that
loop would be most of what is seen.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

import avl_fx
from benchmarks._decoding import TEXT, visual_positions
from benchmarks._models import prompt
from benchmarks.gpu.contenders import CONTENDERS
from benchmarks.gpu.exact import float32_copy
from benchmarks.gpu.gate import Reference, verdict
from benchmarks.gpu.probe import Probe
from benchmarks.gpu.settings import Cell, Settings
from benchmarks.gpu.shapes import shape
from benchmarks.gpu.timing import Stopwatch, deciles

__all__ = ["PrefillBench"]

WARM_UP = 3


class PrefillBench:
    """One cell: the model, a prompt, and what the logits of its last token and of the next one have to be."""

    def __init__(self, cell: Cell, settings: Settings) -> None:
        self.settings, self.batch, self.shape = settings, cell.batch, shape(cell.model)
        self.model = self.shape.make(settings.layers, settings.torch_dtype, settings.device)
        self.stopwatch = Stopwatch(settings.device)
        self.length = self.shape.visual + TEXT
        self.rows = sorted({0, cell.batch - 1})
        self.next_token = torch.full((cell.batch, 1), 11, device=settings.device)
        self.reference, self.keys = self._references()

    def facts(self) -> dict[str, Any]:
        """What every contender of this cell meets."""
        return {
            "prompt": self.length,
            "visual": self.shape.visual,
            "layers": self.settings.layers,
            "of_layers": self.shape.layers,
            "gate_rows": self.rows,
        }

    @staticmethod
    def names() -> list[str]:
        """Who takes part."""
        return [name for name, contender in CONTENDERS.items() if "prefill" in contender.phases]

    def measure(self, name: str) -> dict[str, Any]:
        """Time and verdict of one contender."""
        contender = CONTENDERS[name]
        forward = contender.make(self.model, self.settings)
        inputs = self._inputs(self.model)
        cache, seconds, logits = None, [], []
        start = time.perf_counter()
        with torch.no_grad(), self._told(), Probe(self.settings.device) as probe, contender.attending(self.model):
            for call in range(WARM_UP + self.settings.prompts):
                cache = self._cache(contender.cache, cache)
                torch.compiler.cudagraph_mark_step_begin()
                took, out = self.stopwatch.time(
                    lambda cache=cache: forward(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                )
                seconds.append(took)
                logits.append(out.logits[self.rows, -1].float())
                del out
                if call == WARM_UP - 1:
                    probe.warmed_up(time.perf_counter() - start)
        moved = self._moved(cache)
        # Whatever was done to the cache, stock attention finds everything in it.
        behind = self._next(self.model, cache, self.batch)[self.rows]
        gate = verdict(torch.stack([logits[0], logits[-1], behind]), self.reference, self.settings.torch_dtype)
        gate["rows_moved"] = moved
        if moved != contender.partitioned and gate["passed"]:
            gate |= {"passed": False, "reason": "rows of the cache moved" if moved else "no partition was started"}
        timed = seconds[WARM_UP:]
        times = deciles(timed)
        return {
            "gate": gate,
            "ms": times,
            "tokens_per_second": round(self.batch * self.length / times["median"] * 1e3),
            **probe.facts(),
        }

    def _inputs(self, model: Any, rows: list[int] | None = None) -> dict[str, Tensor]:
        rows = list(range(self.batch)) if rows is None else rows
        positions = torch.arange(self.length, device=self.settings.device).expand(len(rows), -1)
        if self.shape.family == "llava":
            made = prompt(model, self.batch, TEXT, self.shape.images)
            pixels = made["pixel_values"].unflatten(0, (self.batch, self.shape.images))[rows].flatten(0, 1)
            return {"input_ids": made["input_ids"][rows], "pixel_values": pixels, "position_ids": positions}
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randint(10, self.shape.vocabulary, (self.batch, self.length), generator=generator)
        embeddings = model.get_input_embeddings()(drawn[rows].to(self.settings.device))
        return {"inputs_embeds": embeddings, "position_ids": positions}

    def _told(self) -> contextlib.AbstractContextManager[None]:
        if self.shape.family == "llava":
            return contextlib.nullcontext()
        return avl_fx.modality_ids(visual_positions(self.batch, self.shape.visual, self.settings.device))

    def _cache(self, kind: str, before: Any = None, rows: int | None = None) -> Any:
        """An empty cache with room for the prompt and a token; a static one keeps its buffers from call to call."""
        text = self.model.config.get_text_config()
        if kind == "dynamic":
            return DynamicCache(config=text)
        if before is not None:
            before.reset()
            return before
        cache = StaticCache(config=text, max_cache_len=self.length + 1)
        sizes = (rows or self.batch, self.shape.kv_heads, self.shape.head_dim)
        cache.early_initialization(*sizes, self.settings.torch_dtype, torch.device(self.settings.device))
        return cache

    @torch.no_grad()
    def _next(self, model: Any, cache: Any, batch: int) -> Tensor:
        """Logits ``[batch, vocabulary]`` of one token more by the stock eager model."""
        position = torch.full((batch, 1), self.length, device=self.settings.device)
        out = model.forward(
            input_ids=self.next_token[:batch], position_ids=position, past_key_values=cache, use_cache=True
        )
        return out.logits[:, -1].float()

    @torch.no_grad()
    def _references(self) -> tuple[Reference, Tensor]:
        """Logits ``[3, rows, vocabulary]``, those of the prompt twice; and the first layer's visual keys."""

        def run(model: Any) -> tuple[Tensor, Tensor]:
            cache = DynamicCache(config=model.config.get_text_config())
            inputs = self._inputs(model, self.rows)
            out = model.forward(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            keys = self._visual_keys(cache.layers[0].keys).clone()
            return torch.stack([out, out, self._next(model, cache, len(self.rows))]), keys

        exact_model = float32_copy(self.model)
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(allow_tf32=False):
            exact, _ = run(exact_model)
        del exact_model
        plain, keys = run(self.model)
        return Reference("stock eager model, float32; prompt and one stock step on its cache", exact, plain), keys

    def _visual_keys(self, keys: Tensor) -> Tensor:
        return keys[:, :, TEXT // 2 : TEXT // 2 + self.shape.visual].float()

    def _moved(self, cache: Any) -> bool:
        """Whether the visual keys of the first layer stand in another order than stock attention stores them in."""
        difference = self._visual_keys(cache.layers[0].keys[self.rows]) - self.keys
        return bool(difference.abs().mean() > 0.1 * self.keys.abs().mean())
