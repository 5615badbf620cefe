"""Timing on a GPU: events on its own clock, what a plain copy reaches, and calls without the host in between."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["Stopwatch", "copy_speed", "deciles", "replay", "sets_beyond_the_cache"]

Result = TypeVar("Result")


class Stopwatch:
    """Times single calls: by events on a GPU, by the clock elsewhere."""

    def __init__(self, device: str) -> None:
        self._events = None
        if torch.device(device).type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(self, call: Callable[[], Result]) -> tuple[float, Result]:
        """Seconds from the start of ``call`` on an idle device until the device has done all of it."""
        if self._events is None:
            start = time.perf_counter()
            result = call()
            return time.perf_counter() - start, result
        first, last = self._events
        torch.cuda.synchronize()
        first.record()
        result = call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3, result


def deciles(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, the nine deciles and the number of timings, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 9
    return {
        "median": round(statistics.median(seconds) * 1e3, 5),
        "deciles": [round(cut * 1e3, 5) for cut in cuts],
        "count": len(seconds),
    }


def copy_speed(device: str) -> float:
    """Bytes read and written a second by a copy that is far larger than any cache."""
    elements = (2 << 30 if torch.device(device).type == "cuda" else 16 << 20) // 4
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    stopwatch = Stopwatch(device)
    seconds = [stopwatch.time(lambda: target.copy_(source))[0] for _ in range(13)][3:]
    return 2 * source.nbytes / statistics.median(seconds)


def sets_beyond_the_cache(device: str, one: int) -> int:
    """How many sets of ``one`` byte count to go through in turn, so that none is still in the device's cache."""
    if torch.device(device).type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    return max(2, -(-4 * cache // one))


def replay(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """One CUDA graph of all ``calls``: running it costs the host a single launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
