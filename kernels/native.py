"""Builds and loads the CPU kernels that are written in C++, once a machine.

They are plain C functions without a header of torch's, so the compiler that Inductor needs on a CPU anyway builds one
in seconds. An ``operator.cpp`` beside one gives it to PyTorch's dispatcher, by libtorch's stable ABI, so that calls do
not pass through Python; where that cannot be built they do.

Libraries are kept under `cache_folder`, by names that say what they were made from. They are linked without an OpenMP
runtime of their own: they find torch's, and with it torch's threads.

Where there is no compiler, `load` says why and the operators take their ATen implementation.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["bind", "cache_folder", "check_dtype", "compiler", "dispatches", "has_units", "load"]

log = logging.getLogger("avl_fx")

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall")
TORCH = Path(torch.__file__).parent
OF_TORCH = (f"-I{TORCH / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL")
"""What an ``operator.cpp`` needs in addition: the ABI of the oldest PyTorch that is supported, 2.11."""
DISABLED = "AVL_FX_NATIVE"
"""Set this variable to 0 to do without; the ATen implementations then serve."""
FOLDER = "AVL_FX_CACHE_DIR"
UNITS = {
    torch.bfloat16: {"avx512bw", "avx512_bf16", "amx_bf16", "avx_vnni_int8", "bf16", "svebf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "avx_vnni_int8", "asimdhp"},
}
"""What Linux calls the instructions, on x86 and on ARM, with which ATen's libraries multiply numbers of half precision.
(oneDNN does so in bfloat16 with any AVX-512, and in both with the AVX2 of newer processors.)"""
HEADERS = Path(__file__).parent
"""Folder of the headers that several kernels share; a kernel's own lie beside it."""


def cache_folder() -> Path:
    """Where built libraries are kept: ``$AVL_FX_CACHE_DIR``, else ``avl_fx`` in the user's cache folder."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avl_fx"


def compiler() -> str | None:
    """The C++ compiler that builds the kernels: ``$CXX``, else ``g++`` or ``c++`` where there is one."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def bind(source: Path, name: str, arguments: Sequence[Any], result: Any = None) -> Callable[..., Any] | None:
    """The C function ``name`` of the library built from ``source``; ``None`` where `load` gives none.

    Args:
        source: the C++ file.
        name: of the function.
        arguments: ctypes types of its arguments.
        result: ctypes type of what it returns.
    """
    library = load(source)
    if library is None:
        return None
    function: Any = getattr(library, name)
    function.argtypes, function.restype = list(arguments), result
    return function


def check_dtype(dtype: torch.dtype, **tensors: Tensor) -> None:
    """Raise before a C function, which sees addresses alone, takes elements of one size for those of another.

    Raises:
        TypeError: naming the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: {tensor.dtype} instead of {dtype}.")


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether ATen has instructions to multiply in ``dtype``; taken for granted where nobody says what there are."""
    if dtype not in UNITS:
        return True
    flags = _flags()
    return flags is None or not UNITS[dtype].isdisjoint(flags.split())


@cache
def load(source: Path) -> ctypes.CDLL | None:
    """The library built from ``source``; ``None``, and one line in the log, where it cannot be built or loaded.

    Where an ``operator.cpp`` lies beside it, the library is made from that, which includes the source, and gives its
    operators to PyTorch's dispatcher. Without it they are what they were, implemented in Python.
    """
    if os.environ.get(DISABLED) == "0":
        return None
    operator = source.with_name("operator.cpp")
    try:
        if operator.exists():
            return ctypes.CDLL(str(_built(operator, OF_TORCH, (f"-L{TORCH / 'lib'}", "-ltorch_cpu"))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.info("%s cannot be built, its calls pass through Python: %s", operator, error)
    try:
        return ctypes.CDLL(str(_built(source)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning(
            "%s cannot be built, slower kernels serve instead: %s. Fix: install g++ (or name one in CXX), or set %s=0.",
            source.name,
            error,
            DISABLED,
        )
        return None


def dispatches(source: Path) -> bool:
    """Whether calls of the kernel in ``source`` reach it without passing through Python."""
    library = load(source)
    return library is not None and "_operator_" in Path(library._name).name


def _built(source: Path, flags: Sequence[str] = (), linked_with: Sequence[str] = ()) -> Path:
    program = compiler()
    if program is None:
        raise RuntimeError("no C++ compiler found")
    version = _output([program, "--version"])
    headers = [path for folder in (source.parent, HEADERS) for path in sorted(folder.glob("*.h"))]
    included = [source.with_name("native.cpp")] if source.name == "operator.cpp" else []
    texts = [path.read_text("utf-8") for path in (source, *included, *headers)]
    flags = [*FLAGS, *flags]
    made_from = "\n".join([*texts, *flags, *linked_with, torch.__version__, version, _processor()])
    name = f"{source.parent.name}_{source.stem}_{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        folder = Path(tempfile.mkdtemp(prefix="avl_fx_"))
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled, linked = Path(scratch) / "kernel.o", Path(scratch) / "kernel.so"
            _output([program, *flags, f"-I{HEADERS}", "-c", str(source), "-o", str(compiled)])
            # Without -fopenmp: torch's runtime serves.
            _output([program, "-shared", str(compiled), *linked_with, "-o", str(linked)])
            linked.replace(library)  # at once: another process may look for it now
    return library


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:1])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _processor() -> str:
    """What ``-march=native`` may use: a cache folder can be shared by different machines."""
    return _flags() or f"{platform.machine()} {platform.processor()}"


def _flags() -> str | None:
    """The line that names the processor's instructions; ``None`` where Linux does not give one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), None)
