"""Run a zoo model as a user would: one prefill, then greedy decode steps."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from avl_fx._compat import cache_argument, cache_of

CACHES = ("none", "dynamic", "static")


class Run(list):
    """The logits [batch, vocab] of the prompt's last position and of each decode step: `steps + 1` tensors."""

    tokens: Tensor
    """The continuation [batch, steps + 1]; the last token was chosen and never fed."""
    cache: Any
    """The cache after the last step, or None."""


class _Forced(LogitsProcessor):
    def __init__(self, tokens: Tensor, prompt: int):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        chosen = self.tokens[:, step : step + 1] if step < self.tokens.shape[1] else scores.argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs on ``device``."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@torch.no_grad()
def prefill(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits [batch, seq, vocab] of one forward pass over the prompt."""
    out = model(**inputs)
    return out[0] if isinstance(out, tuple) else out.logits


@torch.no_grad()
def prefill_and_decode(
    model: nn.Module,
    inputs: dict[str, Tensor],
    cache: Any = "dynamic",
    steps: int = 4,
    forward: Callable[..., Any] | None = None,
    tokens: Tensor | None = None,
) -> Run:
    """One prefill and `steps` greedy decode steps through the model's own `generate`.

    `cache`: "none" (every step runs the whole sequence), "dynamic", "static", or a cache object. `forward` stands in
    for `model.forward`, for example `torch.compile(model.forward, ...)`; a model compiled in place needs nothing.
    `tokens` [batch, >= steps] forces the continuation: then two implementations stay comparable even where an argmax is
    near a tie.
    """
    if not hasattr(model, "generation_config"):
        assert isinstance(cache, str), "the hand-written model has its own cache"
        logits, chosen, kept = model.generate(**inputs, steps=steps, cache=cache, forward=forward, forced=tokens)
        run = Run(logits)
        run.tokens, run.cache = chosen, kept
        return run

    options: dict[str, Any] = {"use_cache": cache != "none"}
    if cache == "static":
        options["cache_implementation"] = "static"
    elif not isinstance(cache, str):
        options[cache_argument()] = cache
    prompt = inputs["input_ids"].shape[1]
    if tokens is not None:
        options["logits_processor"] = LogitsProcessorList([_Forced(tokens, prompt)])
    patched = "forward" in vars(model)
    before = model.forward
    if forward is not None:
        model.forward = wraps(before)(lambda *args, **kwargs: forward(*args, **kwargs))  # generate reads the signature
    try:
        out = model.generate(
            **inputs,
            **options,
            max_new_tokens=steps + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
        )
    finally:
        if forward is not None:
            if patched:
                model.forward = before
            else:
                del model.forward
    run = Run(out.logits)
    run.tokens, run.cache = out.sequences[:, prompt:], cache_of(out)
    return run
