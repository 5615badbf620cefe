"""What every Triton kernel must do. `test_triton.py` runs this file twice: interpreted, and compiled on a GPU.

Triton reads `TRITON_INTERPRET` when it is imported, so each run is a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from avl_fx.kernels.inherited_decode import anchor_decode_reference
from avl_fx.kernels.inherited_decode.triton import anchor_decode_triton, inherited_decode_triton
from avl_fx.kernels.latent_decode import latent_decode_reference
from avl_fx.kernels.latent_decode.triton import latent_decode_triton
from avl_fx.kernels.partition import triton as partition_kernels
from avl_fx.kernels.partition.triton import partition_layers_triton, partition_triton
from avl_fx.kernels.partitioned_decode import partitioned_decode_reference
from avl_fx.kernels.partitioned_decode.triton import partitioned_decode_triton
from avl_fx.kernels.reselect.triton import reselect_triton
from avl_fx.kernels.visual_scores.triton import visual_scores_triton
from tests.e2e._covering import rest_in_matrix
from tests.kernels import (
    test_inherited_decode,
    test_latent_decode,
    test_partition,
    test_partitioned_decode,
    test_reselect,
    test_visual_scores,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
HEADS = ((4, 4), (8, 2), (6, 1))
OFTEN = {(torch.float32, 8, 2), (torch.float16, 6, 1), (torch.bfloat16, 4, 4)}
GROUPS = [
    pytest.param(dtype, *heads, marks=() if (dtype, *heads) in OFTEN else pytest.mark.matrix)
    for dtype in HALF_OR_SINGLE
    for heads in HEADS
]
"""Interpreted in `make test`: each dtype and each grouping once. `make test-matrix` and a GPU: all of them."""


def on_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Runs it on copies on the device, of the same layout in memory, and brings back all that it wrote."""

    def run(*arguments: Any) -> Any:
        wholes = [(x, _whole(x).to(DEVICE)) if isinstance(x, Tensor) else (x, None) for x in arguments]
        there = [x if y is None else y.as_strided(x.shape, x.stride(), x.storage_offset()) for x, y in wholes]
        result = implementation(*there)
        for here, written in wholes:
            if written is not None and not INTERPRETED:
                _whole(here).copy_(written)
        if result is None:
            return None
        return result.cpu() if isinstance(result, Tensor) else tuple(x.cpu() for x in result)

    return run


def _whole(tensor: Tensor) -> Tensor:
    """All memory behind a tensor."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0)


attend = on_device(partitioned_decode_triton)
attend_latents = on_device(latent_decode_triton)
anchor = on_device(anchor_decode_triton)
inherit = on_device(inherited_decode_triton)
score = on_device(visual_scores_triton)
move = on_device(partition_triton)
reselect = on_device(reselect_triton)


def move_layers(caches: Sequence[tuple[Tensor | None, Tensor | None, int]], source: Tensor, slots: Tensor) -> None:
    """`partition_layers_triton` on the device."""
    tensors = [cache for key, value, _ in caches for cache in (key, value)]

    def run(source: Tensor, slots: Tensor, *tensors: Tensor | None) -> None:
        orders = [order for _, _, order in caches]
        partition_layers_triton(list(zip(tensors[::2], tensors[1::2], orders, strict=True)), source, slots)

    on_device(run)(source, slots, *tensors)


check_decode = partial(test_partitioned_decode.check, attend=attend, wishes=(True,))
check_scores = partial(test_visual_scores.check, implementation=score)
Decode, Scores = test_partitioned_decode.Case, test_visual_scores.Case


def skip_products_of_bfloat16(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies matrices of bfloat16 as if their bits were integers")


# ---- avl::partitioned_decode -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "heads", "kv_heads"), GROUPS)
def test_decode_dtypes_and_groups(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    skip_products_of_bfloat16(dtype)
    case = Decode(heads, kv_heads, value_dim=24, dtype=dtype)
    rows = test_partitioned_decode.SHAPES["ragged"]
    check_decode(case, rows, case.visible((2, 1, 1, 40)))
    bias = torch.randn(2, heads, 1, 40, generator=torch.Generator().manual_seed(3))
    check_decode(case, rows, bias)


@pytest.mark.parametrize("shape", test_partitioned_decode.SHAPES)
def test_decode_ranges(shape: str) -> None:
    rows = test_partitioned_decode.SHAPES[shape]
    case = Decode(4, 2, head_dim=24, layout="heads inside")
    check_decode(case, rows, case.visible((2, 4, 1, 40)), wishes=(True, False))


@pytest.mark.parametrize("keys", [1, 63, 1000])
def test_decode_awkward_lengths(keys: int) -> None:
    case, third = Decode(6, 2, keys=keys, batch=1), keys // 3
    check_decode(case, [[(keys - third, third), (0, third)]])
    check_decode(case, [test_partitioned_decode.DENSE])
    check_decode(case, [[(keys // 2, 10)]])  # leaves most splits empty


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_decode_masks_of_another_dtype_and_shape(mask_dtype: torch.dtype) -> None:
    case, rows = Decode(4, 2), test_partitioned_decode.SHAPES["text, core, text"]
    for shape in ((40,), (2, 4, 1, 1)):
        visible = case.visible(shape)
        visible[..., 0] = True
        for lowest in (torch.finfo(mask_dtype).min, -torch.inf):
            check_decode(case, rows, torch.zeros(shape, dtype=mask_dtype).masked_fill(~visible, lowest))


def test_decode_of_rows_that_the_lowest_mask_hides() -> None:
    """It is finite, so it hides nothing where it hides everything: all keys count alike."""
    query, key, value = Decode(4, 2).tensors()
    mask = torch.full((2, 1, 1, 40), torch.finfo(torch.float32).min)
    ranges = test_partitioned_decode.segments([[(0, 40)]] * 2)
    out, _ = attend(query, key, value, None, None, mask, ranges, test_partitioned_decode.asked(False), 0.3)
    assert test_partitioned_decode.error(out, value.mean(2, keepdim=True).repeat_interleave(2, 1)) <= 3e-6


@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
def test_decode_does_not_see_what_is_hidden(boolean: bool) -> None:
    case = Decode()
    query, key, value = case.tensors()
    visible = case.visible((2, 1, 1, 40))
    mask = visible if boolean else torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    ranges = test_partitioned_decode.segments(test_partitioned_decode.SHAPES["ragged"])
    wanted = test_partitioned_decode.asked()
    clean = partitioned_decode_reference(query, key, value, None, None, mask, ranges, wanted, 0.3)
    read = torch.zeros(2, 1, 40, dtype=torch.bool)
    for row in range(2):
        for start, length in ranges[row].tolist():
            read[row, :, start : start + length] = True
    hidden = (~visible[:, :, 0] | ~read).expand(2, 2, 40)
    key[hidden], value[hidden] = torch.nan, torch.inf
    result = attend(query, key, value, None, None, mask, ranges, wanted, 0.3)
    for got, expected in zip(result, clean, strict=True):
        assert test_partitioned_decode.error(got, expected) <= 3e-6


def test_decode_shows_nan_that_is_read() -> None:
    query, key, value = Decode().tensors()
    ranges = test_partitioned_decode.segments([[(0, 3)], [(39, 1)]])
    for broken in ((torch.full_like(key, torch.nan), value), (key, torch.full_like(value, torch.nan))):
        out, _ = attend(query, *broken, None, None, None, ranges, test_partitioned_decode.asked(False), 0.3)
        assert out.isnan().all()


@pytest.mark.parametrize("layout", test_partitioned_decode.LAYOUTS)
@pytest.mark.parametrize("shape", test_partitioned_decode.SHAPES)
def test_decode_stores_the_new_row_and_nothing_else(shape: str, layout: str) -> None:
    case = Decode(4, 2, value_dim=24, layout=layout)
    test_partitioned_decode.check_new_row(case, test_partitioned_decode.SHAPES[shape], attend)


def test_decode_without_any_stored_row() -> None:
    case = Decode(keys=0)
    new_key, new_value = case.new()
    ranges, wanted = test_partitioned_decode.segments([[(0, 5)]] * 2), test_partitioned_decode.asked()
    out, weights = attend(*case.tensors(), new_key, new_value, None, ranges, wanted, 0.3)
    assert test_partitioned_decode.error(out, new_value.repeat_interleave(4, 1)) <= 3e-6
    torch.testing.assert_close(weights, torch.ones(2, 2, 1))


@pytest.mark.parametrize("appends", [False, True])
def test_decode_without_ranges(appends: bool) -> None:
    case = Decode()
    for mask in (None, case.visible((2, 1, 1, 40 + appends))):
        test_partitioned_decode.check_without_ranges(case, mask, appends, attend)


def test_decode_of_many_segments() -> None:
    case = Decode(keys=200, batch=1)
    check_decode(case, [[(3 * i, 2) for i in range(64)]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [256, 512])
def test_decode_of_wide_rows(dim: int, dtype: torch.dtype) -> None:
    """Gemma's: a tile of them holds fewer keys."""
    case, rows = Decode(4, 2, head_dim=dim, dtype=dtype), test_partitioned_decode.SHAPES["ragged"]
    check_decode(case, rows, case.visible((2, 1, 1, 40)))
    check_decode(case, [test_partitioned_decode.DENSE] * 2)


# ---- avl::latent_decode ----------------------------------------------------------------------------------------------


def check_latents(case: Decode, *arguments: Any, **more: Any) -> None:
    test_latent_decode.check(case, *arguments, **more, implementations=(attend_latents,))


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize("heads", [1, 16, pytest.param(20, id="20, a tile and a part of one")])
def test_latent_dtypes_and_heads(dtype: torch.dtype, heads: int) -> None:
    skip_products_of_bfloat16(dtype)
    case = test_latent_decode.latent_case(heads=heads, dtype=dtype)
    rows = test_partitioned_decode.SHAPES["ragged"]
    check_latents(case, rows, case.visible((2, 1, 1, 40)))
    check_latents(case, rows, torch.randn(2, heads, 1, 40, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("layout", rest_in_matrix(test_partitioned_decode.LAYOUTS, ["heads inside"]))
@pytest.mark.parametrize("shape", test_partitioned_decode.SHAPES)
def test_latent_ranges_and_rows_that_are_stored(shape: str, layout: str) -> None:
    rows = test_partitioned_decode.SHAPES[shape]
    case = test_latent_decode.latent_case(heads=18, layout=layout)
    check_latents(case, rows, case.visible((2, 18, 1, 41)), True)


@pytest.mark.parametrize("keys", [1, 63, 1000])
def test_latent_awkward_lengths(keys: int) -> None:
    case, third = test_latent_decode.latent_case(heads=6, keys=keys, batch=1, rank=40), keys // 3
    check_latents(case, [[(keys - third, third), (0, third)]])
    check_latents(case, None, None, True)


def test_latent_decode_does_not_see_what_is_hidden() -> None:
    """Rows outside of the ranges, and rows that the mask hides from all heads, may hold anything."""
    case = test_latent_decode.latent_case(heads=4)
    visible = case.visible((2, 1, 1, 40))
    rows = test_partitioned_decode.SHAPES["ragged"]
    ranges, wanted = test_partitioned_decode.segments(rows), test_partitioned_decode.asked()
    query, latents, rotated = test_latent_decode.tensors(case)
    clean = latent_decode_reference(query, latents, rotated, None, None, visible, ranges, wanted, 0.3)
    hidden = ~(visible & test_inherited_decode.covered(rows, 40))[:, 0, 0]
    latents[:, 0][hidden], rotated[:, 0][hidden] = torch.nan, torch.inf
    result = attend_latents(query, latents, rotated, None, None, visible, ranges, wanted, 0.3)
    for got, expected in zip(result, clean, strict=True):
        assert test_partitioned_decode.error(got, expected) <= 3e-6


def test_latent_decode_shows_nan_that_is_read() -> None:
    query, *caches = test_latent_decode.tensors(test_latent_decode.latent_case(heads=4))
    ranges = test_partitioned_decode.segments([[(0, 3)], [(39, 1)]])
    for number in (0, 1):
        broken = [torch.full_like(x, torch.nan) if i == number else x for i, x in enumerate(caches)]
        out, _ = attend_latents(query, *broken, None, None, None, ranges, test_partitioned_decode.asked(False), 0.3)
        assert out.isnan().all()


# ---- avl::anchor_decode and avl::inherited_decode --------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "heads", "kv_heads"), GROUPS)
def test_anchor_logits(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    skip_products_of_bfloat16(dtype)
    case = Decode(heads, kv_heads, dtype=dtype)
    rows = test_partitioned_decode.segments(test_partitioned_decode.SHAPES["ragged"])
    for appends in (False, True):
        new = case.new() if appends else (None, None)
        mask = case.visible((2, 1, 1, 40 + appends))
        arguments = *case.tensors(), *new, mask, rows, None, 0.3
        logits, expected = anchor(*arguments)[2], anchor_decode_reference(*arguments)[2]
        hidden = expected == -torch.inf
        assert torch.equal(logits == -torch.inf, hidden)
        got, wanted = logits.masked_fill(hidden, 0), expected.masked_fill(hidden, 0)
        assert test_partitioned_decode.error(got, wanted) <= test_partitioned_decode.TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "heads", "kv_heads"), GROUPS)
def test_inherited_dtypes_and_groups(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    if heads != kv_heads:
        skip_products_of_bfloat16(dtype)
    case = Decode(heads, kv_heads, value_dim=24, dtype=dtype)
    rows = test_partitioned_decode.SHAPES["text, core, text"]
    for inherited in (None, test_inherited_decode.INHERITED["ragged"]):
        test_inherited_decode.check(case, rows, inherited, case.visible((2, 1, 1, 40)), inherit)
        test_inherited_decode.check(case, None, inherited, None, inherit)


@pytest.mark.parametrize(
    ("shape", "inherited"),
    [
        pytest.param(shape, inherited, marks=() if (i + j) % 5 == 0 else pytest.mark.matrix)
        for i, shape in enumerate(test_partitioned_decode.SHAPES)
        for j, inherited in enumerate(test_inherited_decode.INHERITED)
    ],
)
def test_inherited_ranges(shape: str, inherited: str) -> None:
    rows = test_partitioned_decode.SHAPES[shape]
    case = Decode(4, 2, head_dim=24, layout="heads inside")
    test_inherited_decode.check(case, rows, test_inherited_decode.INHERITED[inherited], None, inherit)


@pytest.mark.parametrize("dtype", rest_in_matrix([torch.float32, torch.float16], [torch.float32]), ids=str)
def test_inherited_wide_rows(dtype: torch.dtype) -> None:
    case, rows = Decode(4, 2, head_dim=512, value_dim=512, dtype=dtype), test_partitioned_decode.SHAPES["ragged"]
    test_inherited_decode.check(case, rows, test_inherited_decode.INHERITED["ragged"], None, inherit)


@pytest.mark.parametrize("own", [False, True])
def test_inherited_stores_the_new_row_and_nothing_else(own: bool) -> None:
    test_inherited_decode.check_new_row(Decode(value_dim=24), own, inherit)


@pytest.mark.parametrize("anchor", [False, True])
def test_inherited_stores_the_new_row_behind_the_keys_that_are_there(anchor: bool) -> None:
    test_inherited_decode.check_new_row_of_fewer_keys(Decode(value_dim=24), anchor, inherit)


# ---- avl::visual_scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_scores_dtypes_and_groups(dtype: torch.dtype, heads: int, kv_heads: int, window: int) -> None:
    case = Scores(heads, kv_heads, head_dim=24, dtype=dtype)
    check_scores(case, window=window)
    check_scores(case, causal=True, window=window)
    check_scores(case, case.padded([0, 4], [0, 0]), window=window)
    check_scores(case, test_visual_scores.additive(case.padded([0, 0], [3, 0])), window=window)


@pytest.mark.parametrize("queries", [1, 63, 1000])
def test_scores_awkward_lengths(queries: int) -> None:
    case = Scores(4, 2, queries, batch=1)
    check_scores(case, case.padded([queries // 3], [queries // 4]), window=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [256, 512])
def test_scores_of_wide_rows(dim: int, dtype: torch.dtype) -> None:
    """Rows and keys are spread over several tiles."""
    case = Scores(8, 2, 40, batch=1, head_dim=dim, dtype=dtype)
    check_scores(case, causal=True, window=7)


def test_scores_of_more_rows_than_a_tile_holds() -> None:
    case = Scores(8, 1, 30, batch=1)
    check_scores(case, causal=True, window=20)


def test_scores_of_a_later_turn_in_a_static_cache() -> None:
    case = Scores(past=6, spare=7)
    mask = case.padded([0, 2], [0, 0])
    query, key = case.tensors()
    key[:, :, 15:] = torch.nan
    for given in (mask, test_visual_scores.additive(mask, lowest=-torch.inf)):
        check_scores(case, given, window=3, positions=case.positions)
        assert not score(query, key, given, case.positions, 0.3, False, 3).isnan().any()


def test_scores_without_a_real_query() -> None:
    case = Scores(past=4)
    mask = torch.zeros(2, 1, 9, 13, dtype=torch.bool)
    mask[0, ..., :3] = True
    assert not check_scores(case, mask, window=2, positions=case.positions).any()


# ---- avl::partition_ -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", test_partition.LAYOUTS)
@pytest.mark.parametrize("dtype", test_partition.DTYPES, ids=str)
def test_moves_of_every_row_to_its_slot(layout: str, dtype: torch.dtype) -> None:
    for groups in (1, 3):
        source, slots = test_partition.permutation(2, groups, 20, 12, seed=groups, ragged=True)
        key, value = test_partition.cache(2, 3, 20, 8, dtype), test_partition.cache(2, 3, 20, 5, dtype, seed=1)
        moved = test_partition.laid_out(key, layout), test_partition.laid_out(value, layout)
        move(*moved, source, slots)
        assert torch.equal(moved[0], test_partition.expected(key, source, slots))
        assert torch.equal(moved[1], test_partition.expected(value, source, slots))


@pytest.mark.parametrize("keys", [1, 63, 300])
def test_moves_of_awkward_lengths(keys: int) -> None:
    source, slots = test_partition.permutation(1, 2, keys, keys, seed=keys)
    key = test_partition.cache(1, 2, keys, 8)
    for arguments in ((key.clone(), None), (None, key.clone())):
        move(*arguments, source, slots)
        moved = next(x for x in arguments if x is not None)
        assert torch.equal(moved, test_partition.expected(key, source, slots))


@pytest.mark.parametrize("layout", test_partition.LAYOUTS)
@pytest.mark.parametrize("dtype", rest_in_matrix(test_partition.DTYPES, [torch.float32, torch.int8]), ids=str)
def test_moves_of_several_layers(layout: str, dtype: torch.dtype) -> None:
    test_partition.check_layers(layout, dtype, move_layers)


@pytest.mark.parametrize("most_scratch", [5000, 1])
def test_moves_of_layers_that_take_turns(most_scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or one of them fit into the scratch memory."""
    monkeypatch.setattr(partition_kernels, "MOST_SCRATCH", most_scratch)
    test_partition.check_layers("part of a buffer", torch.float32, move_layers)


@pytest.mark.parametrize("which", [0, 1])
def test_moves_of_several_layers_keys_or_values(which: int) -> None:
    test_partition.check_layers("heads inside", torch.bfloat16, move_layers, left_out=which)


# ---- the choice of core ----------------------------------------------------------------------------------------------


MANY = [(case, 300) for case in test_reselect.CASES]
FEW = [(case, visual) for case in test_reselect.CASES for visual in (1, 6, 63)]


@pytest.mark.parametrize(("case", "visual"), rest_in_matrix(FEW + MANY, FEW + MANY[1:3], apart=True))
def test_reselects(case: str, visual: int) -> None:
    test_reselect.check(test_reselect.CASES[case], visual, reselect)


def test_reselects_rows_of_nan() -> None:
    test_reselect.check_nan(reselect)
