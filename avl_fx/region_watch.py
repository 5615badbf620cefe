"""Around each call of a region: the backend is told what runs, and what did nothing is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from avl_fx import _compat
from avl_fx.modality import carried, given, pop_given, push_given
from avl_fx.region import Region
from avl_fx.region_call import RunningRegion, call_region
from avl_fx.runtime import calls, decoder_calls
from avl_fx.spliced_rows import SplicedRows

__all__ = ["NothingDone", "RegionWatch"]

log = logging.getLogger("avl_fx")


class RegionWatch:
    """Makes the calls of a region, so that the backend knows what it is, and lets ``notice`` see them.

    A decoder that is handed embeddings, and about which nobody has said anything, is told what was spliced in there.
    """

    def __init__(self, region: Region, notice: NothingDone | None) -> None:
        self._region, self._notice = region, notice
        self._spliced = SplicedRows(region.module) if region.role == "decoder" else None
        self._running = RunningRegion(self._decoder)

    @property
    def pieces(self) -> int:
        """How many graphs one kind of call of the region takes, as far as that is known."""
        return self._running.pieces

    def __call__(self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        def made() -> Any:
            return call(*args, **kwargs)

        if self._region.role == "model":
            return self._noticed(made)
        token = None if self._spliced is None or given() is not None else self._tell(self._spliced, args, kwargs)
        try:
            return call_region(self._running, lambda: self._noticed(made))
        finally:
            pop_given(token)

    def _tell(self, spliced: SplicedRows, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        embeds = spliced.embeddings(args, kwargs)
        if embeds is None or carried([embeds]) is not None:
            return None
        visual = spliced.positions(args, kwargs)
        if visual is None and self._notice is not None:
            self._notice.positions_are_unknown()
        return push_given(visual)

    def _noticed(self, call: Callable[[], Any]) -> Any:
        return call() if self._notice is None else self._notice(call)

    def _decoder(self) -> frozenset[nn.Module]:
        return frozenset() if self._region.role == "vision" else _compat.decoder_modules(self._region.module)


class NothingDone:
    """Says once that a region ran and none of its graphs did, or none that shows how it attends: then its plan did
    nothing."""

    def __init__(self, name: str, asks_for_positions: bool) -> None:
        self._name, self._said = name, False
        self._asks_for_positions = asks_for_positions

    def __call__(self, call: Callable[[], Any]) -> Any:
        before, decoded_before = calls(), decoder_calls()
        result = call()
        ran, decoded = calls() > before + 1, decoder_calls() > decoded_before + 1
        if self._said or decoded:
            return result
        self._said = True
        if ran:
            log.warning(
                "%s was captured in pieces that do not show how its layers attend, so the plan that it was compiled "
                "with did nothing. That is so for caches that keep their keys in pages (generate_batch), or that "
                "quantise them. avl_fx.explain(model, plan, front_door='avl_fx.compile', **inputs) shows the pieces.",
                self._name or "The model",
            )
        else:
            log.warning(
                "%s ran eagerly, so the plan that it was compiled with did nothing. Dynamo skips code that it met "
                "under a TorchDispatchMode (torch.utils.flop_counter) for good, all code while it is switched off "
                "(torch.compiler.set_stance, TORCH_COMPILE_DISABLE), modules with hooks of accelerate (a device_map "
                "over several devices), and code that others compiled up to their recompile_limit (torch without "
                "isolate_recompiles). Fix: switch it on, torch._dynamo.reset(), or load it on one device.",
                self._name or "The model",
            )
        return result

    def positions_are_unknown(self) -> None:
        """A prompt came in as embeddings, and nobody knows which of them are an image's."""
        if self._asks_for_positions:
            self._asks_for_positions = False
            log.warning(
                "%s was given embeddings, and which of them are visual is not known: what the plan does to visual "
                "tokens stays undone. Fix: with avl_fx.modality_ids(ids): model.generate(...), where ids [batch, "
                "sequence] are 0 at text.",
                self._name,
            )
