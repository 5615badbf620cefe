"""A process of its own for what is measured, so that whatever happens in it is a line in the results and no more.

A failed compilation or an exhausted memory is an exception there and a reason here. A process that dies, hangs or has
lost its device is replaced; the contenders that follow are measured in the new one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import multiprocessing
import os
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu.settings import Cell, Settings

__all__ = ["Worker", "contender_names"]

START_SECONDS = 300.0
"""For imports and the start of the device, besides the time that a task may take."""
LAST_SECONDS = 10.0
"""For a process that is asked to end."""
LONGEST_REASON = 2000


def _phases() -> dict[str, Any]:
    from benchmarks.gpu.attention import AttentionBench
    from benchmarks.gpu.decode import DecodeBench
    from benchmarks.gpu.prefill import PrefillBench

    return {"attention": AttentionBench, "decode": DecodeBench, "prefill": PrefillBench}


def contender_names(cell: Cell, settings: Settings) -> list[str]:
    """Who takes part in ``cell``."""
    for module in settings.extra:
        importlib.import_module(module)
    return _phases()[cell.phase].names()


class Worker:
    """Runs tasks in another process, one at a time, and says what became of each."""

    def __init__(self, settings: Settings, timeout: float) -> None:
        self._settings, self._timeout = settings, timeout
        self._process: Any = None
        self._connection: Connection | None = None
        self._prepared: Cell | None = None

    def prepare(self, cell: Cell) -> dict[str, Any]:
        """Make ``cell`` ready: ``{"facts": ...}`` or ``{"reason": ...}``."""
        answer = self._ask("prepare", cell)
        self._prepared = cell if "reason" not in answer else None
        return answer

    def measure(self, cell: Cell, name: str) -> dict[str, Any]:
        """The figures of one contender, or ``{"reason": ...}``."""
        if self._prepared != cell:
            answer = self.prepare(cell)
            if "reason" in answer:
                return answer
        return self._ask("measure", cell, name)

    def close(self, kindly: bool = True) -> None:
        """End the process: when it is ready, if ``kindly`` and if that is soon."""
        if self._process is not None:
            assert self._connection is not None
            if kindly:
                with contextlib.suppress(OSError):
                    self._connection.send(None)
                self._process.join(LAST_SECONDS)
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = self._prepared = None

    def _ask(self, *task: Any) -> dict[str, Any]:
        allowed = self._timeout
        if self._process is None:
            allowed += START_SECONDS
            self._start()
        assert self._connection is not None
        try:
            self._connection.send(task)
            if not self._connection.poll(allowed):
                self.close(kindly=False)
                return {"reason": f"timed out: no answer within {allowed:.0f} seconds"}
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            return {"reason": f"the process ended with exit code {code}"}
        if answer.pop("lost", False):
            self.close()
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._settings, os.getpid()))
        self._process.start()
        theirs.close()


# ---- the other process -----------------------------------------------------------------------------------------------


def _serve(connection: Connection, settings: Settings, parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    from benchmarks.gpu.timing import copy_speed

    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # where graphs break is no news here
    torch._dynamo.config.recompile_limit = 64
    for module in settings.extra:
        importlib.import_module(module)
    phases, bench = _phases(), None
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        if task is None:
            return
        what, cell, *rest = task
        try:
            if what == "prepare":
                bench = None
                _tidy(settings)
                bench = phases[cell.phase](cell, settings)
                answer = {"facts": {"copy_bytes_per_second": round(copy_speed(settings.device)), **bench.facts()}}
            else:
                _tidy(settings)
                answer = bench.measure(*rest)
        except Exception as error:
            answer = {
                "reason": _reason(error),
                "where": traceback.format_exc()[-LONGEST_REASON:],
                "lost": _lost(settings),
            }
        connection.send(answer)


def _tidy(settings: Settings) -> None:
    """Nothing of the contender before stays: no compiled code, no CUDA graph, no cached memory."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.device(settings.device).type == "cuda":
        torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_REASON]


def _lost(settings: Settings) -> bool:
    """Whether the device is of no use to this process any more, as after an illegal access."""
    import torch

    if torch.device(settings.device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=settings.device).add_(1).item()
    except Exception:
        return True
    return False


def _end_with(parent: int) -> None:
    """Do not outlive the process that asked."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
