"""What a bug report has to say about the machine: versions, processor, accelerator, compiler. No names, no paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from avl_fx import _compat

__all__ = ["collect", "render"]

_PACKAGES = ("avl-fx", "torch", "triton", "transformers", "pydantic", "rich", "typer")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve", "sve2")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "TORCHDYNAMO_CAPTURE_SCALAR_OUTPUTS",
    "TORCHDYNAMO_DISABLE",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES",
    "TORCH_COMPILE_DISABLE",
    "TRANSFORMERS_DISABLE_TORCH_CHECK",
    "TRITON_INTERPRET",
)
"""Variables that change what is compiled. A fixed list: others may hold what nobody wants to paste."""


def collect() -> dict[str, Any]:
    """Everything as plain data with stable keys; what cannot be found out is ``None``."""
    return {
        "packages": {name.replace("-", "_"): _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "hip": getattr(torch.version, "hip", None),
        "cpp_compiler": _cpp_compiler(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def render(report: dict[str, Any]) -> str:
    """``report`` as lines of text."""
    cpu = report["cpu"]
    rows = [(name.replace("_", "-"), version or "not installed") for name, version in report["packages"].items()]
    rows += [
        ("python", report["python"]),
        ("os", f"{report['os']}, {report['machine']}"),
        (
            "cpu",
            f"{cpu['model'] or 'unknown'}, {cpu['usable']} of {cpu['count']} cores, {cpu['threads']} torch threads",
        ),
        ("cpu flags", f"{' '.join(cpu['flags']) or 'unknown'} (torch uses {cpu['capability']})"),
        ("cuda, hip", f"{report['cuda'] or 'no'}, {report['hip'] or 'no'}"),
    ]
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['architecture']}" for gpu in report["gpus"]]
    rows += [("gpu", gpu) for gpu in gpus or ["none"]]
    missing = "not found: Inductor cannot compile for the CPU"
    rows.append(("c++ compiler", report["cpp_compiler"] or missing))
    rows += [("variable", f"{name}={value}") for name, value in report["environment"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # with its build (+cu130), which the distribution's version may lack
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": info.get("model name") or platform.processor() or None,
        "count": os.cpu_count(),
        "usable": usable,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor of Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text.split("\n\n")[0], re.MULTILINE))


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "architecture": architecture or f"sm_{properties.major}{properties.minor}",
            }
        )
    return found


def _cpp_compiler() -> str | None:
    """Name and version line of the compiler that Inductor would call."""
    compiler = _compat.cpp_compiler()
    if compiler is None:
        return None
    name = Path(compiler).name
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return name
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else name
