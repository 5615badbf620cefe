"""What else is noted of a contender: memory, what was compiled, whether CUDA graphs were used, where sites went."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import torch
from torch._dynamo.utils import counters

from avl_fx.passes.share_queries import DECODER_ROLES
from avl_fx.record import recording

__all__ = ["Probe"]


class Probe:
    """A block around all calls of one contender."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._stack = contextlib.ExitStack()
        self._seen: dict[str, Any] = {}

    def __enter__(self) -> Probe:
        counters.clear()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._recorder = self._stack.enter_context(recording())
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def warmed_up(self, seconds: float) -> None:
        """The calls so far took ``seconds``, compilation included; from now on nothing is recorded, only counted."""
        self._stack.close()
        self._seen["warm_up_s"] = round(seconds, 2)
        self._seen["graphs"] = counters["stats"]["unique_graphs"]

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        found = dict(self._seen)
        late = counters["stats"]["unique_graphs"] - found.get("graphs", 0)
        if late:
            found["compiled_while_timed"] = late
        for name in ("cudagraph_skips", "cudagraph_recorded_non_static_inputs"):
            if counters["inductor"][name]:
                found[name] = counters["inductor"][name]
        if self._cuda:
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        sites = [s for graph in self._recorder.graphs for s in graph.sites if s.role in DECODER_ROLES]
        if sites:
            found["sites"] = dict(Counter(f"refused: {s.reason}" if s.reason else s.action for s in sites))
        return found
