"""Building and loading the C++ kernels."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avl_fx.kernels import native
from tests._compiler import needs_compiler

SOURCE = """#include "vectors.h"
extern "C" int answer() {
  int total = 0;
#pragma omp parallel num_threads(2)
#pragma omp atomic
  total += 21;
  return total;
}
"""

pytestmark = needs_compiler


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(native.FOLDER, str(tmp_path / "cache"))
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


def write(folder: Path, text: str = SOURCE) -> Path:
    path = folder / "kernel.cpp"
    path.write_text(text)
    return path


def test_a_library_is_built_once(folder):
    source = write(folder)
    assert native.load(source).answer() == 42
    (built,) = (folder / "cache").glob("*.so")
    before = built.stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load(source).answer() == 42
    assert built.stat().st_mtime_ns == before
    native.load.cache_clear()
    assert native.load(write(folder, SOURCE.replace("21", "4"))).answer() == 8
    assert len(list((folder / "cache").glob("*.so"))) == 2
    assert not [p for p in (folder / "cache").iterdir() if p.suffix != ".so"]


def test_what_does_not_compile_is_named_and_done_without(folder, caplog):
    assert native.load(write(folder, "this is no C++")) is None
    assert "kernel.cpp cannot be built" in caplog.text
    assert native.DISABLED in caplog.text


def test_without_a_compiler(folder, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert native.load(write(folder)) is None
    assert "no C++ compiler found" in caplog.text


def test_a_compiler_that_is_not_there(folder, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert native.load(write(folder)) is None
    assert "/nowhere/g++" in caplog.text


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv(native.FOLDER, str(folder / "file" / "below"))
    assert native.load(write(folder)).answer() == 42


def test_the_variable_switches_all_of_them_off():
    code = (
        "from avl_fx.kernels.narrow_linear import is_available; "
        "from avl_fx.kernels.partitioned_decode.native import _function; "
        "assert not is_available() and _function() is None"
    )
    env = {**os.environ, native.DISABLED: "0"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


@pytest.mark.parametrize(
    ("line", "bfloat16", "float16"),
    [
        ("flags\t\t: fpu avx2 f16c avx_vnni", False, False),
        ("flags\t\t: fpu avx2 f16c avx512f avx512bw avx512vl", True, False),
        ("flags\t\t: fpu avx512_bf16", True, False),
        ("flags\t\t: fpu amx_bf16 avx512_fp16", True, True),
        ("Features\t: fp asimd asimdhp bf16", True, True),
        ("Features\t: fp asimd", False, False),
        (None, True, True),
    ],
)
def test_units_of_the_processor(line, bfloat16, float16, monkeypatch):
    monkeypatch.setattr(native, "_flags", lambda: line)
    found = [native.has_units.__wrapped__(d) for d in (torch.bfloat16, torch.float16, torch.float32)]
    assert found == [bfloat16, float16, True]


def test_an_operator_that_does_not_compile_is_done_without(folder, caplog):
    source = folder / "native.cpp"
    source.write_text(SOURCE)
    source.with_name("operator.cpp").write_text("#error no\n")
    with caplog.at_level("INFO", "avl_fx"):
        assert native.bind(source, "answer", [], ctypes.c_int)() == 42
    assert "its calls pass through Python" in caplog.text
