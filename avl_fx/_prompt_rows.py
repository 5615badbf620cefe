"""One batch of a calibration: run the prompt, take its attention rows, and refuse what teaches nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from avl_fx._inputs import check_inputs
from avl_fx._messages import show
from avl_fx._words import count, ranges
from avl_fx.errors import CalibrationError, CaptureError
from avl_fx.observe import ObservedForward, Observer
from avl_fx.passes.context import ObservedAttention

__all__ = ["PromptRows", "check_batch", "prompt_rows"]


@dataclass(frozen=True)
class PromptRows:
    """What one prompt shows. Batch rows without a real token are left out: ``samples`` are the others."""

    attention: ObservedAttention
    rows: Mapping[int, Tensor]
    """Layer -> float32 ``[samples, heads, keys]``."""
    visual: Tensor | None
    """Visual keys, bool ``[samples, keys]``; ``None``: images come in through cross-attention."""
    keys: int
    """Keys that ``visual`` is for."""
    linears: int
    """Linear calls of the decoder's graph."""


def check_batch(model: nn.Module, batch: object, number: int) -> Mapping[str, Any]:
    """``batch``, if it can be given to ``model``.

    Raises:
        CalibrationError: no mapping, without a tensor, or with something else where a tensor belongs.
    """
    field = f"batches[{number}]"
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"must be a mapping of what the model takes, got {show(batch)}",
            field=field,
            remedy="yield for example processor(images=..., text=..., return_tensors='pt')",
        )
    try:
        check_inputs(model, batch, "processor(images=..., text=..., return_tensors='pt')")
    except CaptureError as error:
        inside = "" if error.field in (None, "inputs") else f".{error.field}"
        raise CalibrationError(error.message, field=f"{field}{inside}", remedy=error.remedy) from None
    return batch


def prompt_rows(model: nn.Module, observer: Observer, batch: Mapping[str, Any], number: int) -> PromptRows:
    """Run ``model`` on one batch and return the attention rows of its prompt.

    Raises:
        CalibrationError: the decoder is not in one graph, its attention cannot be observed, a row holds NaN, no visual
            token is among the keys, or nobody knows which are visual.
    """
    field = f"batches[{number}]"
    observer.forwards.clear()
    model(**_short_output(model, batch))
    forwards = list(observer.forwards)
    observer.forwards.clear()
    forward = _the_decoder(forwards, field)
    for layer, row in forward.rows.items():
        if row.isnan().any():
            raise CalibrationError(
                f"the attention row of layer {layer} holds NaN",
                field=field,
                remedy="look for NaN in the inputs and the weights, or use a dtype with a wider range",
            )
    # A batch row without a real query has no attention row.
    alive = torch.stack([row.flatten(1).any(1) for row in forward.rows.values()]).any(0)
    if not alive.any():
        raise CalibrationError(
            "no row holds a token that counts: the attention mask hides all of them", field=field, remedy="drop it"
        )
    visual = _visual(forward, field)
    counted = _counted_layer(forward)
    return PromptRows(
        attention=replace(forward.attention, excluded=_all_excluded(forward.attention)),
        rows={layer: row[alive] for layer, row in forward.rows.items()},
        visual=None if visual is None else visual[alive.to(visual.device)],
        keys=forward.rows[counted].shape[-1],
        linears=forward.record.linears.get("before", 0),
    )


def _short_output(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for ``model``: without the logits of a whole prompt, where the model can do without."""
    spared = "logits_to_keep" in inspect.signature(model.forward).parameters and "labels" not in batch
    return {**({"logits_to_keep": 1} if spared else {}), **batch}


def _the_decoder(forwards: list[ObservedForward], field: str) -> ObservedForward:
    """The one graph that holds the decoder of a prompt."""
    if not forwards:
        raise CalibrationError(
            "no attention of a decoder was found in what ran",
            field=field,
            remedy="give prompts of more than one token; explain(model, front_door='avl_fx.compile', **batch) shows "
            "what is found",
        )
    if len(forwards) > 1:
        held = [sorted([*f.rows, *f.attention.excluded]) for f in forwards]
        where = f" (layers {'; '.join(map(ranges, held))})" if all(held) else ""
        repeated = sum(map(len, held)) > len({layer for layers in held for layer in layers})
        raise CalibrationError(
            f"the decoder ran {len(forwards)} times in one call"
            if repeated
            else f"the decoder is in {len(forwards)} graphs{where}, and layers of different graphs cannot share",
            field=field,
            remedy="give one prompt a call"
            if repeated
            else "see where Dynamo breaks: explain(model, front_door='avl_fx.compile', **batch), or TORCH_LOGS="
            "graph_breaks",
        )
    forward = forwards[0]
    if len(forward.rows) < 2:
        excluded = _all_excluded(forward.attention)
        reasons = "; ".join(f"layer {n}: {why}" for n, why in sorted(excluded.items()))
        raise CalibrationError(
            f"the attention of {count(len(forward.rows), 'layer')} can be observed, two are needed"
            f"{f' ({reasons})' if reasons else ': the layers have no numbers'}",
            field="model",
            remedy="explain(model, front_door='avl_fx.compile', **batch) shows every attention call",
        )
    return forward


def _all_excluded(attention: ObservedAttention) -> dict[int, str]:
    """Layer -> why it is not observed, for every layer of the decoder that is not."""
    seen = {layer.layer for layer in attention.layers}
    missing = set(range(attention.depth or 0)) - seen - attention.excluded.keys()
    return {**attention.excluded, **dict.fromkeys(sorted(missing), "no attention of it in the decoder's graph")}


def _counted_layer(forward: ObservedForward) -> int:
    """The layer whose keys are all keys of the prompt: the first that attends to all, if any."""
    layers = forward.attention.layers
    return next((layer.layer for layer in layers if layer.kind == "full"), layers[0].layer)


def _visual(forward: ObservedForward, field: str) -> Tensor | None:
    """Visual keys, bool ``[batch, keys]``; ``None`` under cross-attention."""
    if forward.attention.cross:
        return None
    rows = forward.rows[_counted_layer(forward)]
    visual = forward.visual_keys(rows.shape[-1])
    if visual is None or len(visual) != len(rows):
        raise CalibrationError(
            "nobody knows which of its tokens are visual, or what is known does not fit the prompt",
            field=field,
            remedy="name them: yield the batch inside `with avl_fx.modality_ids(ids):`; or drop it if it has no image",
        )
    if not visual.any():
        raise CalibrationError(
            "holds no visual token, it is text only",
            field=field,
            remedy="calibrate on prompts with images, like those that the model is going to see",
        )
    return visual
