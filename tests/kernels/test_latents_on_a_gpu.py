"""`avl::latent_decode` on a GPU at the sizes of DeepSeek-V3 and Kimi, through the dispatcher and in CUDA graphs.

`_triton_cases.py` holds its kernel against the reference on small awkward shapes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avl_fx.kernels.latent_decode import latent_decode_reference
from tests._gpu import DEVICE, NEEDS_GPU, plain_float32  # noqa: F401  (a fixture)
from tests.kernels.test_on_a_gpu import (
    DTYPES,
    KEYS,
    LARGE,
    RAGGED,
    TOLERANCE,
    WEIGHTS,
    captured,
    drawn,
    error,
    nothing_waits,
    ranges,
    wish,
)

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("plain_float32")]

RANK, ROPE = 512, 64
SCALE = (128 + ROPE) ** -0.5


def operands(heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, latents, rotated keys and the new row of both; the caches are parts of buffers that are NaN elsewhere."""
    stored = []
    for seed, dim in enumerate((RANK, ROPE)):
        buffer = torch.full((3, 1, KEYS + 70, dim), torch.nan, device=DEVICE, dtype=dtype)
        buffer[:, :, :KEYS] = drawn(3, 1, KEYS, dim, dtype=dtype, seed=seed)
        stored.append(buffer[:, :, :KEYS])
    new = [drawn(3, 1, 1, dim, dtype=dtype, seed=2 + dim) for dim in (RANK, ROPE)]
    return drawn(3, heads, 1, RANK + ROPE, dtype=dtype, seed=4), *stored, *new


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_latents(heads: int, dtype: torch.dtype, mask: str) -> None:
    query, latents, rotated, *new = operands(heads, dtype)
    visible = drawn(3, 1, 1, KEYS + 1, seed=5) > -0.5
    masks = {"none": None, "bool": visible, "additive": drawn(3, 1, 1, KEYS + 1, seed=6).to(dtype)}
    rest = (masks[mask], ranges(*RAGGED), wish(True), SCALE)
    whole = [torch.cat(pair, 2) for pair in zip((latents, rotated), new, strict=True)]
    expected = latent_decode_reference(query, *whole, None, None, *rest)
    out, weights = torch.ops.avl.latent_decode(query, latents, rotated, *new, *rest)
    assert error(out, expected[0]) <= TOLERANCE[dtype]
    assert error(weights, expected[1]) <= WEIGHTS
    for cache, rows in zip((latents, rotated), whole, strict=True):
        longer = cache.as_strided((3, 1, KEYS + 1, cache.shape[3]), cache.stride())
        assert torch.equal(longer, rows), "the new row is stored behind the others, which stay as they were"


def test_latents_do_not_wait() -> None:
    given = operands(16, torch.bfloat16)
    rest = (None, ranges(*RAGGED), wish(True), SCALE)
    torch.ops.avl.latent_decode(*given, *rest)
    torch.cuda.synchronize()
    with nothing_waits():
        torch.ops.avl.latent_decode(*given, *rest)


def test_latents_in_a_cuda_graph() -> None:
    """A replay reads the ranges and the rows that are there then."""
    query, latents, rotated, _, _ = operands(16, torch.bfloat16)
    table, wanted, results = ranges(*RAGGED), wish(True), {}

    def call() -> None:
        results["out"], results["weights"] = torch.ops.avl.latent_decode(
            query, latents, rotated, None, None, None, table, wanted, SCALE
        )

    graph = captured(call)
    for seed, rows in enumerate((RAGGED, ([(0, 3)], [(1000, 500), (0, 2)], [(0, LARGE)]))):
        table.copy_(ranges(*rows))
        latents.copy_(drawn(*latents.shape, dtype=latents.dtype, seed=20 + seed))
        graph.replay()
        expected = latent_decode_reference(query, latents, rotated, None, None, None, table, wanted, SCALE)
        assert error(results["out"], expected[0]) <= TOLERANCE[torch.bfloat16]
        assert error(results["weights"], expected[1]) <= WEIGHTS
