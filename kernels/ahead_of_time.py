"""Compiles the Triton kernels for GPUs that are not there: `python -m avl_fx.kernels.ahead_of_time [file.json]`.

A launch is recorded while an operator's wrapper runs on CPU tensors, so the signatures are those of real calls; Triton
then compiles it for each target. Nothing is run. What comes out are the resources that each kernel takes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ["SPECIMENS", "TARGETS", "Launch", "compile_launch", "launches", "main"]

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Name -> backend, architecture and threads of a warp (A100, H100, B200, MI300)."""

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


OPTIONS = ("num_warps", "num_stages")
"""What a launch may say that is no argument of the kernel."""


@dataclass(frozen=True)
class Launch:
    """One kernel and the arguments that it was launched with."""

    specimen: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    """Warps and pipeline stages, where the launch says them."""

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__name__}, {self.specimen}"

    def source(self) -> Any:
        """What `triton.compile` takes: types, constants and alignment as the launch would specialise them."""
        from triton.compiler import ASTSource

        signature, constants, aligned = {}, {}, {}
        for number, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            one = value == 1 if isinstance(value, int) and not parameter.do_not_specialize else False
            if parameter.is_constexpr or value is None or one:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            address = value.data_ptr() if isinstance(value, Tensor) else value
            if isinstance(value, Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if not parameter.do_not_specialize and not isinstance(value, float) and address % 16 == 0:
                aligned[(number,)] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=aligned)


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """Compile for one of `TARGETS`: the size of the binary in bytes, and the resources of one program.

    Registers are those of a thread. Spills are bytes of a thread's local memory on CUDA, registers on ROCm.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(launch.source(), target=GPUTarget(*TARGETS[target]), options=launch.options)
    binary = compiled.asm["cubin" if TARGETS[target][0] == "cuda" else "hsaco"]
    used = _cuda_resources(binary) if TARGETS[target][0] == "cuda" else _hip_resources(compiled.asm["amdgcn"])
    return {
        "kernel": launch.kernel.fn.__name__,
        "specimen": launch.specimen,
        "target": target,
        "binary_bytes": len(binary),
        "warps": compiled.metadata.num_warps,
        "shared_bytes": compiled.metadata.shared,
        **used,
    }


def _cuda_resources(cubin: bytes) -> dict[str, int | None]:
    """Registers and spills as NVIDIA's tool prints them; it comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # What does not fit into registers goes to the stack, which is local memory.
    return {"registers": _number(r"REG:(\d+)", text), "spills": _number(r"STACK:(\d+)", text)}


def _hip_resources(assembly: str) -> dict[str, int | None]:
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", assembly),
        "spills": _number(r"\.vgpr_spill_count:\s*(\d+)", assembly),
    }


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None


# ---- what is compiled ------------------------------------------------------------------------------------------------


def _ranges() -> Tensor:
    from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS

    return torch.zeros(2, MAX_SEGMENTS, 2, dtype=torch.int64)


def _decode(
    dtype: torch.dtype, heads: int, kv_heads: int, mask: str, append: bool, head_dim: int = 128, splits: int = 2
) -> None:
    from avl_fx.kernels.partitioned_decode import triton as module

    key, value = (torch.zeros(2, kv_heads, 80, head_dim, dtype=dtype)[:, :, :64] for _ in range(2))
    new = torch.zeros(2, kv_heads, 1, head_dim, dtype=dtype) if append else None
    masks = {"none": None, "bool": torch.zeros(2, 1, 1, 64 + append) > 0, "additive": torch.zeros(2, 1, 1, 64 + append)}
    segments, weigh = _ranges(), torch.zeros(1, dtype=torch.int32)
    query = torch.zeros(2, heads, 1, head_dim, dtype=dtype)
    # How many there would be is a matter of the device; one alone and several compile to different kernels.
    with mock.patch.object(module, "split_count", return_value=splits):
        module.partitioned_decode_triton(query, key, value, new, new, masks[mask], segments, weigh, 0.1)


def _anchor(dtype: torch.dtype, heads: int, kv_heads: int, mask: bool) -> None:
    from avl_fx.kernels.partitioned_decode.triton import partitioned_decode_triton

    key, value = (torch.zeros(2, kv_heads, 80, 128, dtype=dtype)[:, :, :64] for _ in range(2))
    new, segments = torch.zeros(2, kv_heads, 1, 128, dtype=dtype), _ranges()
    query, kept = torch.zeros(2, heads, 1, 128, dtype=dtype), torch.zeros(2, heads, 65)
    masked = torch.zeros(2, 1, 1, 65) > 0 if mask else None
    partitioned_decode_triton(query, key, value, new, new, masked, segments, None, 0.1, kept=kept)


def _inherited(
    dtype: torch.dtype, heads: int, kv_heads: int, own: bool, anchor: bool = False, head_dim: int = 128
) -> None:
    from avl_fx.kernels.inherited_decode.triton import inherited_decode_triton

    key, value = (torch.zeros(2, kv_heads, 80, head_dim, dtype=dtype)[:, :, :64] for _ in range(2))
    new, ranges = torch.zeros(2, kv_heads, 1, head_dim, dtype=dtype), _ranges()
    query, logits = torch.zeros(2, heads, 1, head_dim, dtype=dtype), torch.zeros(2, heads, 65)
    if anchor:
        short, theirs = key[:, :, :32], torch.zeros_like(value)
        inherited_decode_triton(None, query, short, value, new, new, None, ranges, ranges, 0.1, theirs)
    elif own:
        mask = torch.zeros(2, 1, 1, 65) > 0
        inherited_decode_triton(logits, query, key, value, new, new, mask, ranges, ranges, 0.1)
    else:
        inherited_decode_triton(logits, None, None, value, None, new, None, ranges, None, 0.1)


def _latents(
    dtype: torch.dtype, heads: int, mask: bool, append: bool, rank: int = 512, rope: int = 64, splits: int = 2
) -> None:
    from avl_fx.kernels.latent_decode import triton as module
    from avl_fx.kernels.partitioned_decode import triton as weighing

    latents, rotated = (torch.zeros(2, 1, 80, dim, dtype=dtype)[:, :, :64] for dim in (rank, rope))
    new_latents, new_rotated = (torch.zeros(2, 1, 1, dim, dtype=dtype) if append else None for dim in (rank, rope))
    segments, weigh = _ranges(), torch.zeros(1, dtype=torch.int32)
    query, masked = torch.zeros(2, heads, 1, rank + rope, dtype=dtype), torch.zeros(2, 1, 1, 64 + append) > 0
    several = mock.Mock(return_value=splits)
    with mock.patch.object(module, "split_count", several), mock.patch.object(weighing, "split_count", several):
        module.latent_decode_triton(
            query, latents, rotated, new_latents, new_rotated, masked if mask else None, segments, weigh, 0.1
        )


def _scores(dtype: torch.dtype, heads: int, kv_heads: int, mask: str, window: int, head_dim: int = 128) -> None:
    from avl_fx.kernels.visual_scores.triton import visual_scores_triton

    query, key = (torch.zeros(2, n, 64, head_dim, dtype=dtype) for n in (heads, kv_heads))
    masks = {"causal": None, "bool": torch.ones(2, 1, 64, 64) > 0, "additive": torch.zeros(2, 1, 64, 64, dtype=dtype)}
    visual_scores_triton(query, key, masks[mask], None, 0.1, mask == "causal", window)


def _moves(dtype: torch.dtype, both: bool) -> None:
    from avl_fx.kernels.partition.triton import partition_triton

    key, index = torch.zeros(2, 4, 64, 128, dtype=dtype), torch.zeros(2, 4, 32, dtype=torch.int64)
    partition_triton(key, torch.zeros_like(key) if both else None, index, index)


def _moves_of_layers(dtype: torch.dtype) -> None:
    from avl_fx.kernels.partition.triton import partition_layers_triton

    key, index = torch.zeros(2, 4, 64, 128, dtype=dtype), torch.zeros(3, 2, 4, 32, dtype=torch.int64)
    partition_layers_triton([(key, torch.zeros_like(key), order) for order in range(3)], index, index)


def _reselect(groups: int) -> None:
    from avl_fx.kernels.reselect.triton import reselect_triton

    slots, tokens = torch.zeros(2, 60, dtype=torch.int64), torch.zeros(3, 2, groups, 60, dtype=torch.int64)
    core, secondary = (torch.full((2,), n) for n in (20, 30))
    reselect_triton(torch.zeros(3, 2, groups, 80), slots, tokens, core, secondary, 30, 10)


SPECIMENS: dict[str, tuple[str, Callable[[], None]]] = {
    "bfloat16, 32/8 heads": ("partitioned_decode", lambda: _decode(torch.bfloat16, 32, 8, "none", True)),
    "float16, 28/4 heads, bool mask": ("partitioned_decode", lambda: _decode(torch.float16, 28, 4, "bool", True)),
    "bfloat16, 16/16 heads, bias": ("partitioned_decode", lambda: _decode(torch.bfloat16, 16, 16, "additive", True)),
    "bfloat16, 32/32 heads": ("partitioned_decode", lambda: _decode(torch.bfloat16, 32, 32, "none", False)),
    "bfloat16, 32/32 heads, one split": (
        "partitioned_decode",
        lambda: _decode(torch.bfloat16, 32, 32, "none", True, splits=1),
    ),
    "bfloat16, 28/4 heads": ("partitioned_decode", lambda: _decode(torch.bfloat16, 28, 4, "none", True)),
    "float32, 12/4 heads": ("partitioned_decode", lambda: _decode(torch.float32, 12, 4, "none", False, 64)),
    "bfloat16, 8/4 heads of 256": ("partitioned_decode", lambda: _decode(torch.bfloat16, 8, 4, "none", True, 256)),
    "bfloat16, 8/4 heads of 512, bool mask": (
        "partitioned_decode",
        lambda: _decode(torch.bfloat16, 8, 4, "bool", True, 512),
    ),
    "float32, 8/4 heads of 256, bool mask": (
        "partitioned_decode",
        lambda: _decode(torch.float32, 8, 4, "bool", True, 256),
    ),
    "bfloat16, 32/32 heads, logits kept": ("partitioned_decode", lambda: _anchor(torch.bfloat16, 32, 32, False)),
    "bfloat16, 28/4 heads, logits kept, bool mask": (
        "partitioned_decode",
        lambda: _anchor(torch.bfloat16, 28, 4, True),
    ),
    "bfloat16, 32/32 heads, all inherited": (
        "inherited_decode",
        lambda: _inherited(torch.bfloat16, 32, 32, False),
    ),
    "bfloat16, 28/4 heads, all inherited": (
        "inherited_decode",
        lambda: _inherited(torch.bfloat16, 28, 4, False),
    ),
    "bfloat16, 28/4 heads, own and inherited": (
        "inherited_decode",
        lambda: _inherited(torch.bfloat16, 28, 4, True),
    ),
    "bfloat16, 28/4 heads, own keys and the anchor's": (
        "inherited_decode",
        lambda: _inherited(torch.bfloat16, 28, 4, True, anchor=True),
    ),
    "bfloat16, 8/4 heads of 512, own and inherited": (
        "inherited_decode",
        lambda: _inherited(torch.bfloat16, 8, 4, True, head_dim=512),
    ),
    "bfloat16, 16 heads, 512 latents": ("latent_decode", lambda: _latents(torch.bfloat16, 16, False, True)),
    "bfloat16, 128 heads, 512 latents, bool mask": (
        "latent_decode",
        lambda: _latents(torch.bfloat16, 128, True, True),
    ),
    "bfloat16, 128 heads, 512 latents, one split": (
        "latent_decode",
        lambda: _latents(torch.bfloat16, 128, False, True, splits=1),
    ),
    "float16, 32 heads, 256 latents": ("latent_decode", lambda: _latents(torch.float16, 32, False, False, 256)),
    "float32, 16 heads, 512 latents": ("latent_decode", lambda: _latents(torch.float32, 16, False, True)),
    "bfloat16, 32/8 heads, causal": ("visual_scores", lambda: _scores(torch.bfloat16, 32, 8, "causal", 1)),
    "bfloat16, 28/4 heads, causal": ("visual_scores", lambda: _scores(torch.bfloat16, 28, 4, "causal", 1)),
    "bfloat16, 32/32 heads, causal": ("visual_scores", lambda: _scores(torch.bfloat16, 32, 32, "causal", 1)),
    "float16, 28/4 heads, window 16": ("visual_scores", lambda: _scores(torch.float16, 28, 4, "bool", 16)),
    "float32, 12/12 heads, bias": ("visual_scores", lambda: _scores(torch.float32, 12, 12, "additive", 1, 64)),
    "bfloat16, 8/4 heads of 512, window 8": (
        "visual_scores",
        lambda: _scores(torch.bfloat16, 8, 4, "bool", 8, 512),
    ),
    "float32, 8/4 heads of 256, causal": ("visual_scores", lambda: _scores(torch.float32, 8, 4, "causal", 1, 256)),
    "bfloat16": ("partition", lambda: _moves(torch.bfloat16, True)),
    "float32, keys alone": ("partition", lambda: _moves(torch.float32, False)),
    "bfloat16, several layers": ("partition", lambda: _moves_of_layers(torch.bfloat16)),
    "scores of 8 heads": ("reselect", lambda: _reselect(8)),
}
"""Name -> operator, and a call of its Triton implementation."""


def launches(specimen: str, target: str = "sm_90") -> list[Launch]:
    """The kernels that a specimen launches for one of `TARGETS`, with their arguments."""
    import importlib

    operator, call = SPECIMENS[specimen]
    recorded: list[Launch] = []
    importlib.import_module(f"avl_fx.kernels.{operator}.triton")
    with ExitStack() as recording:
        for name, module in tuple(sys.modules.items()):
            # One operator may launch kernels of another.
            if name.startswith("avl_fx.kernels.") and name.endswith(".triton"):
                recording.enter_context(_recording(module, specimen, recorded))
        hip = None if TARGETS[target][0] == "cuda" else "for a GPU that is not there"
        recording.enter_context(mock.patch.object(torch.version, "hip", hip))
        call()
    return recorded


@contextmanager
def _recording(module: ModuleType, specimen: str, recorded: list[Launch]) -> Iterator[None]:
    kernels = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}

    def record(kernel: Any) -> Any:
        class Recorder:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return self.launch

            @staticmethod
            def launch(*args: Any, **kwargs: Any) -> None:
                options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
                arguments = dict(kernel.signature.bind(*args, **kwargs).arguments)
                recorded.append(Launch(specimen, kernel, arguments, options))

        return Recorder()

    with mock.patch.multiple(module, **{name: record(kernel) for name, kernel in kernels.items()}):
        yield


def main(arguments: list[str]) -> None:
    """Compile everything for every target, print one line each, and write the rows to a file if one is named."""
    rows = []
    for specimen in SPECIMENS:
        for several in zip(*(launches(specimen, target) for target in TARGETS), strict=True):
            for target, launch in zip(TARGETS, several, strict=True):
                rows.append(row := compile_launch(launch, target))
                print(f"{launch.name:60} {target:8}", *(f"{key}={row[key]}" for key in list(row)[3:]))
    if arguments:
        Path(arguments[0]).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
