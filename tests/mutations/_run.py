"""Plants bugs in copies of the repository and runs the tests there. The checkout is never touched.

Importing torch takes longer than most tests, so it is done once: every run is a fork of a process that has imported
torch and transformers, but neither the package nor the tests.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutations._catalogue import Mutation

__all__ = ["ROOT", "Outcome", "Result", "Run", "run_all", "warm_up"]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 200
_SKIP = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
_WARM = (
    "hypothesis",
    "pydantic",
    "pytest",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.nn.attention.flex_attention",
    "transformers.integrations.sdpa_attention",
    "transformers.models.llama.modeling_llama",
)


class Outcome(enum.StrEnum):
    """What became of a planted bug."""

    KILLED = "killed"
    SURVIVED = "survived"
    STALE = "stale"
    """The patch does not apply: the source has changed."""
    BROKEN = "broken"
    """The tests did not run: the patch makes no sense, or the copy was not imported."""


@dataclass(frozen=True)
class Run:
    """One run of the tests: of one mutation, or of the untouched source."""

    mutation: Mutation | None
    tests: tuple[str, ...]
    """Arguments of pytest."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    outcome: Outcome
    seconds: float
    detail: str = ""
    """The test that noticed, or the end of what pytest said."""


def warm_up() -> None:
    """Import what every run needs and no mutation touches, and let Dynamo import what it imports at first use."""
    for name in _WARM:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    torch._dynamo.reset()
    loaded = [name for name in sys.modules if name == "avl_fx" or name.startswith("avl_fx.")]
    assert not loaded, f"a fork would see the checkout: {loaded}"


def run_all(runs: Sequence[Run], workers: int) -> Iterator[tuple[Run, Result]]:
    """Do ``runs``, ``workers`` at a time, and yield each as it ends."""
    waiting, running = list(runs), dict[int, tuple[Run, float, Path]]()
    while waiting or running:
        while waiting and len(running) < workers:
            run = waiting.pop(0)
            stale = _stale(run.mutation)
            if stale is not None:
                yield run, Result(Outcome.STALE, 0.0, stale)
                continue
            folder = Path(tempfile.mkdtemp(prefix="avl_fx_mutant_"))
            running[_fork(run, folder)] = (run, time.perf_counter(), folder)
        if running:
            child, status = os.wait()
            run, start, folder = running.pop(child)
            yield run, _result(run, os.waitstatus_to_exitcode(status), time.perf_counter() - start, folder)
            shutil.rmtree(folder, ignore_errors=True)


def _stale(mutation: Mutation | None) -> str | None:
    if mutation is None:
        return None
    found = (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)
    return None if found == 1 else f"occurs {found} times: {mutation.old.strip()[:80]}"


def _result(run: Run, code: int, seconds: float, folder: Path) -> Result:
    said = (folder / "said").read_text(encoding="utf-8", errors="replace")
    if code == -signal.SIGALRM:
        return Result(Outcome.KILLED, seconds, "(ran past the time limit)")
    outcome = {0: Outcome.SURVIVED, 1: Outcome.KILLED}.get(code, Outcome.BROKEN)
    return Result(outcome, seconds, _noticed(said) if outcome is Outcome.KILLED else said[-1500:])


def _noticed(said: str) -> str:
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].removeprefix("FAILED ").split("/")[-1] if failed else ""


def _fork(run: Run, folder: Path) -> int:
    """Start ``run`` in a child process; what it says goes to a file in ``folder``."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        signal.alarm(TIMEOUT)
        with open(folder / "said", "w", encoding="utf-8") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code = _pytest(_copy(folder / "repository", run.mutation), run.tests)
            sys.stdout.flush()
    finally:
        os._exit(code)


def _copy(root: Path, mutation: Mutation | None) -> Path:
    """The repository as it is installed: `passes` and `kernels` stand inside the package, so no path maps them."""
    shutil.copytree(ROOT / "avl_fx", root / "avl_fx", ignore=_SKIP)
    for name in ("passes", "kernels"):
        shutil.copytree(ROOT / name, root / "avl_fx" / name, ignore=_SKIP)
    for name in ("tests", "benchmarks"):  # tests use models of the benchmarks
        shutil.copytree(ROOT / name, root / name, ignore=_SKIP)
    shutil.copy(ROOT / "pyproject.toml", root)
    if mutation is not None:
        file = root / mutation.file if mutation.file.startswith("avl_fx/") else root / "avl_fx" / mutation.file
        source = file.read_text(encoding="utf-8")
        file.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    return root


def _pytest(root: Path, tests: Sequence[str]) -> int:
    """Run pytest in ``root``, in this process, with the copy's modules."""
    import pytest

    os.chdir(root)
    os.environ["AVL_FX_MUTANT"] = str(root)
    sys.dont_write_bytecode = True
    sys.path[:] = [str(root), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    options = ["-x", "-q", "-p", "tests.mutations._guard", "-p", "no:cacheprovider", "--show-capture=no", "--tb=short"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    with contextlib.suppress(SystemExit):
        return int(pytest.main([*options, *tests]))
    return 71
