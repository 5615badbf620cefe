"""Every tensor that the library makes names its dtype and its device.

A server that sets `torch.set_default_dtype(torch.bfloat16)` or a default device changes what is made without them, and
kernels in C++ see addresses alone: a buffer of half the size, or on another device, is memory that is not theirs.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FACTORIES = {"empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "scalar_tensor"}
FACTORIES |= {"arange", "randint", "randperm", "tensor", "zeros"}
INTEGERS = {"arange", "randperm"}
"""Of numbers without a fraction these give int64, whatever the default."""
TOOLS = {"ahead_of_time.py"}
"""Compiles kernels for the record; runs in a process of its own."""
FILES = sorted(p.relative_to(ROOT) for folder in ("avl_fx", "passes", "kernels") for p in (ROOT / folder).rglob("*.py"))


def unnamed(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr in FACTORIES and ast.unparse(node.func.value) == "torch":
            wanted = {"device"} if node.func.attr in INTEGERS else {"dtype", "device"}
            missing = wanted - {k.arg for k in node.keywords}
            if missing:
                found.append(f"line {node.lineno}: {ast.unparse(node)} without {' and '.join(sorted(missing))}")
    return found


@pytest.mark.parametrize("path", [p for p in FILES if p.name not in TOOLS], ids=Path.as_posix)
def test_dtype_and_device_are_named(path):
    assert not unnamed((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.zeros(3)", 1),
        ("torch.zeros(3, dtype=torch.int64)", 1),
        ("torch.arange(3)", 1),
        ("torch.full((2,), 1.0, dtype=d, device=x.device)", 0),
        ("x.new_zeros(3); torch.arange(3, device=x.device)", 0),
    ],
)
def test_what_counts(source, found):
    assert len(unnamed(source)) == found
