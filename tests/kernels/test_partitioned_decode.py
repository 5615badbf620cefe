"""`avl::partitioned_decode`: the reference against float64, the implementations against the reference."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_fx.kernels.dispatch import implementation
from avl_fx.kernels.partitioned_decode import IMPLEMENTATIONS, cpu, partitioned_decode_reference
from avl_fx.kernels.partitioned_decode.aten import partitioned_decode_aten
from avl_fx.kernels.partitioned_decode.capacity import with_spare_row
from avl_fx.kernels.partitioned_decode.native import _function
from tests._compiler import skip_without_compiler

TOLERANCE = {
    torch.float64: 1e-6,  # the weights are float32
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.2e-2,
}
"""Largest error over largest value. Half precision: two roundings of the result and one of the probabilities."""

HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
HEADS = ((4, 4), (8, 2), (6, 1))
LARGE = 2**62
DENSE = [(0, LARGE)]
LAYOUTS = ("heads outside", "heads inside")

Rows = list[list[tuple[int, int]]]


@pytest.fixture(params=["native", "aten"], autouse=True, scope="module")
def cpu_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """All tests run with the C++ kernel, and with what serves where there is no compiler."""
    if request.param == "native":
        skip_without_compiler()
        assert _function() is not None
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "aten":
            patch.setattr(cpu, "partitioned_decode_native", lambda *args: None)
        yield request.param


def segments(rows: Rows, most: int = 1) -> Tensor:
    """Ranges of each batch row, filled up with unused entries."""
    most = max(most, *(len(row) for row in rows))
    return torch.tensor([row + [(0, 0)] * (most - len(row)) for row in rows], dtype=torch.int64)


def asked(wanted: bool = True) -> Tensor:
    return torch.tensor([int(wanted)], dtype=torch.int32)


@dataclass(frozen=True)
class Case:
    """Sizes of one call. The cache is a view of a buffer whose other rows are NaN."""

    heads: int = 8
    kv_heads: int = 2
    keys: int = 40
    head_dim: int = 16
    value_dim: int = 16
    batch: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "heads outside"
    spare: int = 3

    def cache(self, dim: int, seed: int) -> tuple[Tensor, Tensor]:
        """A buffer ``[batch, kv_heads, capacity, dim]`` in any order in memory, and the view of its occupied rows."""
        capacity = self.keys + self.spare
        if self.layout == "heads outside":
            buffer = torch.empty(self.batch, self.kv_heads, capacity, dim, dtype=self.dtype)
        else:
            buffer = torch.empty(self.batch, capacity, self.kv_heads, dim, dtype=self.dtype).transpose(1, 2)
        buffer.fill_(torch.nan)
        view = buffer[:, :, : self.keys]
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(seed)))
        return buffer, view

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        query = torch.randn(self.batch, self.heads, 1, self.head_dim, generator=torch.Generator().manual_seed(seed))
        return query.to(self.dtype), self.cache(self.head_dim, seed + 1)[1], self.cache(self.value_dim, seed + 2)[1]

    def new(self, seed: int = 7) -> tuple[Tensor, Tensor]:
        """The key and the value of one more token."""
        generator = torch.Generator().manual_seed(seed)
        key = torch.randn(self.batch, self.kv_heads, 1, self.head_dim, generator=generator)
        value = torch.randn(self.batch, self.kv_heads, 1, self.value_dim, generator=generator)
        return key.to(self.dtype), value.to(self.dtype)

    def visible(self, shape: tuple[int, ...], seed: int = 4) -> Tensor:
        """A boolean mask that hides a third."""
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.33


def truth(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rows: Rows, scale: float
) -> tuple[Tensor, Tensor]:
    """The whole attention matrix in float64, most of it hidden; shares no line with the reference."""
    batch, heads, _, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    read = torch.zeros(batch, 1, 1, keys, dtype=torch.bool)
    for row, ranges in enumerate(rows):
        for j in range(keys):
            read[row, ..., j] = any(start <= j < start + length for start, length in ranges)
    bias = torch.zeros(batch, heads, 1, keys, dtype=torch.float64).masked_fill(~read, -torch.inf)
    if mask is not None:
        bias += torch.zeros_like(bias).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.double()
    # Nothing that all heads of a group leave out may reach the products.
    kept = (bias > -torch.inf).unflatten(1, (kv_heads, -1)).any(2).transpose(-1, -2)
    k, v = (torch.where(kept, t.double(), 0.0).repeat_interleave(heads // kv_heads, 1) for t in (key, value))
    logits = torch.einsum("bhid,bhjd->bhij", query.double(), k) * scale + bias
    weights = (logits - logits.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bhij,bhjd->bhid", weights, v), weights.unflatten(1, (kv_heads, -1)).mean(2).squeeze(2)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value; NaN counts as infinite."""
    difference = (actual.double() - expected.double()).abs().max().item()
    return float("inf") if difference != difference else difference / max(expected.double().abs().max().item(), 1e-30)


def check(
    case: Case,
    rows: Rows,
    mask: Tensor | None = None,
    scale: float = 0.3,
    attend: Callable[..., tuple[Tensor, Tensor]] = IMPLEMENTATIONS["cpu"],
    wishes: tuple[bool, ...] = (True, False),
) -> None:
    """Reference against float64, an implementation against the reference, with and without weights."""
    tensors, ranges = case.tensors(), segments(rows)
    expected = truth(*tensors, mask, rows, scale)
    reference = partitioned_decode_reference(*tensors, None, None, mask, ranges, asked(), scale)
    assert reference[0].dtype == case.dtype
    assert reference[1].dtype == torch.float32
    for got, wanted in zip(reference, expected, strict=True):
        assert got.shape == wanted.shape
        assert error(got, wanted) <= TOLERANCE[case.dtype]
    for wanted in wishes:
        out, weights = attend(*tensors, None, None, mask, ranges, asked(wanted), scale)
        assert (out.shape, out.dtype) == (reference[0].shape, case.dtype)
        assert (weights.shape, weights.dtype) == (reference[1].shape, torch.float32)
        assert error(out, reference[0]) <= TOLERANCE[case.dtype]
        if wanted:
            assert error(weights, reference[1]) <= TOLERANCE[torch.float32]


SHAPES: dict[str, Rows] = {
    "dense": [DENSE, DENSE],
    "one range": [[(5, 9)], [(5, 9)]],
    "text, core, text": [[(0, 3), (3, 10), (33, LARGE)]] * 2,
    "ragged": [[(0, 3), (9, 4)], [(2, 20), (30, 1), (35, 5)]],
    "unordered": [[(30, 5), (0, 2), (7, 4)], [(7, 4), (30, 10), (0, 7)]],
    "unused entries": [[(0, 0), (8, 8)], [(0, 4), (39, 0)]],
    "beyond the end": [[(38, 50), (2, 1)], [(40, 5), (0, 4)]],
    "an empty row": [[], [(0, 4), (6, 3)]],
    "all empty": [[], []],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_dtypes_and_groups(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    case = Case(heads, kv_heads, value_dim=24, dtype=dtype)
    for name in ("dense", "text, core, text", "ragged"):
        check(case, SHAPES[name])
        check(case, SHAPES[name], case.visible((2, 1, 1, 40)))
        check(case, SHAPES[name], torch.randn(2, heads, 1, 40, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ranges(shape: str, layout: str) -> None:
    for heads, kv_heads in HEADS:
        case = Case(heads, kv_heads, layout=layout)
        check(case, SHAPES[shape])
        check(case, SHAPES[shape], case.visible((2, heads, 1, 40)))


@pytest.mark.parametrize("keys", [1, 63, 1000])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
def test_awkward_lengths(keys: int, dtype: torch.dtype) -> None:
    case = Case(keys=keys, dtype=dtype)
    third = keys // 3
    check(case, [DENSE, DENSE])
    check(case, [[(0, third), (keys - third, third)], [(third, 1), (keys - 1, 1)] if keys > 1 else DENSE])
    check(case, [[(0, third), (keys - 1, LARGE)]] * 2, case.visible((2, 1, 1, keys)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from([8, 20, 64, 72, 128]),
    st.sampled_from([8, 20, 64, 72, 128]),
    st.sampled_from(HALF_OR_SINGLE),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 200)), min_size=1, max_size=3),
    st.booleans(),
)
def test_whole_tiles_and_what_is_left_of_them(
    group: int, head_dim: int, value_dim: int, dtype: torch.dtype, gaps: list[tuple[int, int]], masked: bool
) -> None:
    """Ranges of many keys, groups of any number of heads, rows that fill no whole vector."""
    ends = list(itertools.accumulate(gap + length for gap, length in gaps))
    ranges = [(end - length, length) for end, (_, length) in zip(ends, gaps, strict=True)]
    case = Case(2 * group, 2, ends[-1], head_dim, value_dim, dtype=dtype)
    mask = case.visible((2, 1, 1, case.keys)) if masked else None
    check(case, [ranges, ranges[:1]], mask, scale=head_dim**-0.5)


@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
@pytest.mark.parametrize("shape", ["dense", "text, core, text", "ragged"])
def test_masks_of_every_broadcast_shape(shape: str, boolean: bool) -> None:
    case = Case()
    full = (2, 8, 1, 40)
    shapes = {
        tuple(n if keep else 1 for n, keep in zip(full, flags, strict=True))
        for flags in itertools.product((0, 1), repeat=4)
    }
    shapes |= {full[i:] for i in range(5)}
    for wanted in sorted(shapes):
        mask = case.visible(wanted) if wanted else torch.tensor(True)
        if not boolean:
            mask = torch.randn(wanted, generator=torch.Generator().manual_seed(2)) - 5 * (~mask).float()
        check(case, SHAPES[shape], mask)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
def test_additive_masks_of_another_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    for lowest in (torch.finfo(mask_dtype).min, -torch.inf):
        mask = torch.zeros(2, 1, 1, 40, dtype=mask_dtype).masked_fill(~case.visible((2, 1, 1, 40)), lowest)
        check(case, SHAPES["dense"], mask)
        check(case, SHAPES["text, core, text"], mask)


@pytest.mark.parametrize("shape", ["dense", "text, core, text"])
def test_rows_without_a_visible_key(shape: str) -> None:
    case = Case()
    visible = case.visible((2, 8, 1, 40))
    visible[0] = False
    visible[1, 3] = False
    check(case, SHAPES[shape], visible)
    check(case, SHAPES[shape], torch.zeros(visible.shape).masked_fill(~visible, -torch.inf))
    out, weights = IMPLEMENTATIONS["cpu"](*case.tensors(), None, None, visible, segments(SHAPES[shape]), asked(), 0.3)
    assert not out[0].any()
    assert not out[1, 3].any()
    assert not weights[0].any()


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.25, 1e-4])
def test_scales(scale: float) -> None:
    check(Case(), SHAPES["text, core, text"], scale=scale)
    check(Case(), SHAPES["dense"], scale=scale)


@pytest.mark.parametrize("masked", [False, True])
def test_one_range_is_the_call_of_the_stock_kernel(masked: bool) -> None:
    """Bit for bit with ATen: dense attention costs what it costs without this operator."""
    query, key, value = Case(4, 4, keys=300).tensors()
    mask = torch.randn(2, 1, 1, 300, generator=torch.Generator().manual_seed(3)) if masked else None
    stock = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    split: Rows = [[(0, 100), (200, LARGE), (100, 100)], DENSE]
    out, _ = partitioned_decode_aten(query, key, value, None, None, mask, segments(split), asked(False), 0.3)
    assert torch.equal(out, stock)


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("per_head", [False, True])
def test_few_heads_and_many_threads(threads: int, per_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """How heads are handed to the kernel depends on the threads that want work."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = Case(6, 1, batch=1)
    check(case, [DENSE], case.visible((1, 6 if per_head else 1, 1, 40)))
    check(case, [[(3, 30)]])


@pytest.mark.parametrize("threads", [2, 3, 5, 64])
@pytest.mark.parametrize("rows", [[DENSE], [DENSE, [], [(5, 90), (200, 300)]]], ids=["one row", "ragged"])
def test_keys_that_threads_share_unevenly(threads: int, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread walks through its share as one stream of tiles, over heads, batch rows and splits."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = Case(6, 3, keys=700, batch=len(rows), head_dim=64, value_dim=64)
    check(case, rows)
    check(case, rows, case.visible((len(rows), 6, 1, case.keys)))


# ---- what is not read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "dense"])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
def test_what_is_not_read_may_be_anything(shape: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    query, key, value = case.tensors()
    clean = partitioned_decode_reference(query, key, value, None, None, None, segments(SHAPES[shape]), asked(), 0.3)
    for row, ranges in enumerate(SHAPES[shape]):
        read = {j for start, length in ranges for j in range(start, min(start + length, 40))}
        unread = [j for j in range(40) if j not in read]
        key[row, :, unread] = torch.nan
        value[row, :, unread] = torch.inf
    for attend in (partitioned_decode_reference, IMPLEMENTATIONS["cpu"]):
        out, weights = attend(query, key, value, None, None, None, segments(SHAPES[shape]), asked(), 0.3)
        assert error(out, clean[0]) <= TOLERANCE[dtype]
        assert error(weights, clean[1]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", ["dense", "text, core, text", "ragged"])
@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
@pytest.mark.parametrize("per_head", [False, True])
def test_what_is_masked_may_be_anything(shape: str, boolean: bool, per_head: bool) -> None:
    case = Case()
    query, key, value = case.tensors()
    visible = case.visible((2, 8 if per_head else 1, 1, 40))
    mask = visible if boolean else torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    ranges = segments(SHAPES[shape])
    clean = partitioned_decode_reference(query, key, value, None, None, mask, ranges, asked(), 0.3)
    unseen = ~visible.expand(2, 8, 1, 40).unflatten(1, (2, 4)).any(2).squeeze(2)
    key[unseen] = torch.nan
    value[unseen] = torch.nan
    for attend in (partitioned_decode_reference, IMPLEMENTATIONS["cpu"]):
        for wanted in (True, False):
            out, weights = attend(query, key, value, None, None, mask, ranges, asked(wanted), 0.3)
            assert error(out, clean[0]) <= TOLERANCE[torch.float32]
            if wanted:
                assert error(weights, clean[1]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", ["dense", "text, core, text"])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_that_is_read_shows(shape: str, masked: bool) -> None:
    """It stands for keys that were never stored."""
    query, key, value = Case().tensors()
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool) if masked else None
    for broken in ((torch.full_like(key, torch.nan), value), (key, torch.full_like(value, torch.nan))):
        for attend in (partitioned_decode_reference, IMPLEMENTATIONS["cpu"]):
            out, _ = attend(query, *broken, None, None, mask, segments(SHAPES[shape]), asked(False), 0.3)
            assert out.isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 90),
    st.sampled_from(["bool", torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([(1, 1, 1), (2, 1, 1), (2, 8, 1), (1, 8, 3)]),
    st.booleans(),
    st.sampled_from([1, 2, 7]),
)
def test_rows_of_a_buffer_that_nothing_is_stored_in(
    seed: int,
    keys: int,
    kind: str | torch.dtype,
    shape: tuple[int, int, int],
    ranged: bool,
    threads: int,
) -> None:
    """Padding before and empty rows behind, in every row as many as it has, with holes or without between them.

    A mask is the last row of a larger one, as a model cuts it; what it hides from all heads is NaN.
    """
    case, chance = Case(keys=keys), random.Random(seed)
    query, key, value = case.tensors()
    visible = torch.ones(*shape, keys, dtype=torch.bool)
    if chance.random() < 0.5:
        visible = torch.rand(visible.shape, generator=torch.Generator().manual_seed(seed)) > 0.2
    for flags in visible[:, :, -1].flatten(0, 1):  # each batch row and head
        first, last = sorted(chance.choices(range(keys + 1), k=2))
        flags[:first], flags[last:] = False, False
    mask = visible if kind == "bool" else torch.zeros(visible.shape, dtype=kind).masked_fill(~visible, -torch.inf)
    mask, visible = mask[:, :, -1:], visible[:, :, -1:]
    rows: Rows = [[(0, keys // 3), (keys // 2, LARGE)]] * 2 if ranged else [DENSE, DENSE]
    unseen = ~visible.expand(2, 8, 1, keys).unflatten(1, (2, 4)).any(2).squeeze(2)
    expected = truth(query, key, value, mask, rows, 0.3)
    key[unseen] = torch.nan
    value[unseen] = torch.nan
    ranges, wish = (segments(rows), asked()) if ranged else (None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        out, weights = IMPLEMENTATIONS["cpu"](query, key, value, None, None, mask, ranges, wish, 0.3)
    assert error(out, expected[0]) <= TOLERANCE[torch.float32]
    if wish is not None:
        assert error(weights, expected[1]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
def test_one_key_that_is_seen(boolean: bool) -> None:
    """Wherever it stands, the result is its value."""
    case = Case(keys=27)
    query, key, value = case.tensors()
    for seen in range(27):
        hidden = torch.arange(27) != seen
        mask = ~hidden if boolean else torch.zeros(27).masked_fill(hidden, -torch.inf)
        out, _ = IMPLEMENTATIONS["cpu"](query, key, value, None, None, mask.expand(2, 1, 1, 27), None, None, 0.3)
        assert error(out, value[:, :, seen : seen + 1].repeat_interleave(4, 1)) <= TOLERANCE[torch.float32]


# ---- without ranges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
def test_no_ranges_is_every_key(dtype: torch.dtype, appends: bool, masked: bool) -> None:
    case = Case(value_dim=24, dtype=dtype)
    mask = case.visible((2, 1, 1, 40 + appends)) if masked else None
    for attend in (partitioned_decode_reference, IMPLEMENTATIONS["cpu"], torch.ops.avl.partitioned_decode):
        check_without_ranges(case, mask, appends, attend)


def check_without_ranges(
    case: Case, mask: Tensor | None, appends: bool, attend: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """Neither ranges nor a wish for weights, or just one of them."""
    new = case.new() if appends else (None, None)
    ranges = segments([DENSE, DENSE])
    expected = attend(*case.tensors(), *new, mask, ranges, asked(), 0.3)
    for given_ranges, wish in ((None, asked()), (None, None), (ranges, None)):
        out, weights = attend(*case.tensors(), *new, mask, given_ranges, wish, 0.3)
        assert error(out, expected[0]) <= TOLERANCE[case.dtype]
        if wish is None:
            assert weights.shape == (2, 2, 0)
        else:
            assert error(weights, expected[1]) <= TOLERANCE[torch.float32]


def test_an_empty_list_of_ranges_is_no_key() -> None:
    none = torch.zeros(2, 0, 2, dtype=torch.int64)
    for attend in (partitioned_decode_reference, IMPLEMENTATIONS["cpu"]):
        out, weights = attend(*Case().tensors(), None, None, None, none, asked(), 0.3)
        assert not out.any()
        assert not weights.any()


# ---- the new row -----------------------------------------------------------------------------------------------------


def check_new_row(case: Case, rows: Rows, attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The result is that of keys and values with one more row; of the buffers, just that row changes."""
    query, new, mask = case.tensors()[0], case.new(), case.visible((2, 1, 1, 41))
    buffers, views = zip(*(case.cache(dim, seed) for dim, seed in ((16, 1), (24, 2))), strict=True)
    before = [buffer.clone() for buffer in buffers]
    result = attend(query, *views, *new, mask, segments(rows), asked(), 0.3)
    for buffer, old, row in zip(buffers, before, new, strict=True):
        old[:, :, 40:41] = row
        assert torch.equal(buffer.nan_to_num(5.0), old.nan_to_num(5.0))
    joined = [torch.cat([view, row], 2) for view, row in zip(views, new, strict=True)]
    expected = partitioned_decode_reference(query, *joined, None, None, mask, segments(rows), asked(), 0.3)
    assert error(result[0], expected[0]) <= TOLERANCE[case.dtype]
    assert error(result[1], expected[1]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_new_row_is_stored_and_nothing_else(shape: str, layout: str, dtype: torch.dtype) -> None:
    case = Case(value_dim=24, layout=layout, dtype=dtype)
    query = case.tensors()[0]
    new = case.new()
    for attend in (partitioned_decode_reference, IMPLEMENTATIONS["cpu"]):
        buffers, views = zip(*(case.cache(dim, seed) for dim, seed in ((16, 1), (24, 2))), strict=True)
        before = [buffer.clone() for buffer in buffers]
        mask = case.visible((2, 1, 1, 41))
        result = attend(query, *views, *new, mask, segments(SHAPES[shape]), asked(), 0.3)
        for buffer, old, row in zip(buffers, before, new, strict=True):
            old[:, :, 40:41] = row
            assert torch.equal(buffer.nan_to_num(5.0), old.nan_to_num(5.0))
        joined = [torch.cat([view, row], 2) for view, row in zip(views, new, strict=True)]
        expected = partitioned_decode_reference(query, *joined, None, None, mask, segments(SHAPES[shape]), asked(), 0.3)
        assert error(result[0], expected[0]) <= TOLERANCE[dtype]
        assert error(result[1], expected[1]) <= TOLERANCE[torch.float32]


def test_the_first_row_of_all() -> None:
    """Nothing is stored yet: the new token attends to itself."""
    case = Case(keys=0)
    new_key, new_value = case.new()
    out, weights = torch.ops.avl.partitioned_decode(
        *case.tensors(), new_key, new_value, None, segments([DENSE, DENSE]), asked(), 0.3
    )
    assert error(out, new_value.repeat_interleave(4, 1)) <= TOLERANCE[torch.float32]
    assert torch.equal(weights, torch.ones(2, 2, 1))


def test_a_sequence_of_steps() -> None:
    """Each step sees the rows of the steps before."""
    case = Case(keys=5, spare=20)
    keys, values = (case.cache(16, seed)[0] for seed in (1, 2))
    for step in range(20):
        query, (new_key, new_value) = case.tensors(step)[0], case.new(step)
        views = keys[:, :, : 5 + step], values[:, :, : 5 + step]
        out, _ = torch.ops.avl.partitioned_decode(
            query, *views, new_key, new_value, None, segments([DENSE, DENSE]), asked(False), 0.3
        )
        longer = keys[:, :, : 6 + step], values[:, :, : 6 + step]
        expected = truth(query, *longer, None, [DENSE, DENSE], 0.3)[0]
        assert error(out, expected) <= TOLERANCE[torch.float32]


# ---- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from(HEADS))
def test_order_and_number_of_ranges_do_not_matter(seed: int, keys: int, heads: tuple[int, int]) -> None:
    """A set of keys is a set: cut into ranges anyhow, and stored in any order."""
    case, chance = Case(*heads, keys=keys, batch=1), random.Random(seed)
    query, key, value = case.tensors()
    chosen = sorted(chance.sample(range(keys), chance.randint(1, keys)))
    single: Rows = [[(j, 1) for j in chance.sample(chosen, len(chosen))]]
    expected = truth(query, key, value, None, single, 0.3)
    out, weights = IMPLEMENTATIONS["cpu"](query, key, value, None, None, None, segments(single), asked(), 0.3)
    assert error(out, expected[0]) <= TOLERANCE[torch.float32]
    assert error(weights, expected[1]) <= TOLERANCE[torch.float32]
    order = chosen + [j for j in range(keys) if j not in chosen]
    front: Rows = [[(0, len(chosen))]]
    moved, _ = IMPLEMENTATIONS["cpu"](
        query, key[:, :, order], value[:, :, order], None, None, None, segments(front), asked(False), 0.3
    )
    assert error(moved, expected[0]) <= TOLERANCE[torch.float32]


# ---- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(mask: str | None, dtype: torch.dtype) -> None:
    case = Case(value_dim=24, dtype=dtype)
    given = {None: None, "bool": case.visible((2, 1, 1, 40)), "additive": torch.zeros(2, 8, 1, 40)}[mask]
    for shape in ("dense", "ragged"):
        torch.library.opcheck(
            torch.ops.avl.partitioned_decode.default,
            (*case.tensors(), None, None, given, segments(SHAPES[shape]), asked(), 0.3),
        )
    torch.library.opcheck(
        torch.ops.avl.partitioned_decode.default, (*case.tensors(), None, None, given, None, None, 0.3)
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_in_a_compiled_graph(backend: str) -> None:
    """The operator gets the very views, not copies, and lengths are not specialised."""
    torch._dynamo.reset()
    case = Case(spare=10)
    keys, values = (case.cache(16, seed)[0] for seed in (1, 2))

    def step(query: Tensor, key: Tensor, value: Tensor, new_key: Tensor, new_value: Tensor, ranges: Tensor) -> Tensor:
        return torch.ops.avl.partitioned_decode(query, key, value, new_key, new_value, None, ranges, asked(False), 0.3)[
            0
        ]

    compiled = torch.compile(step, backend=backend, dynamic=True, fullgraph=True)
    for number, rows in enumerate((SHAPES["dense"], SHAPES["ragged"], SHAPES["dense"])):
        query, (new_key, new_value) = case.tensors(number)[0], case.new(number)
        views = keys[:, :, : 40 + number], values[:, :, : 40 + number]
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            out = compiled(query, *views, new_key, new_value, segments(rows, most=5))
        assert torch.equal(keys[:, :, 40 + number], new_key[:, :, 0])
        longer = keys[:, :, : 41 + number], values[:, :, : 41 + number]
        assert error(out, truth(query, *longer, None, rows, 0.3)[0]) <= TOLERANCE[torch.float32]


# ---- errors ----------------------------------------------------------------------------------------------------------


def call(operator: Any = torch.ops.avl.partitioned_decode, **changed: object) -> None:
    case = Case()
    query, key, value = case.tensors()
    new_key, new_value = case.new()
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "new_key": new_key,
        "new_value": new_value,
        "mask": None,
        "segments": segments(SHAPES["ragged"]),
        "weigh": asked(),
        "scale": 0.3,
    }
    operator(**{**arguments, **changed})


WRONG = {
    "two queries": ({"query": torch.zeros(2, 8, 2, 16)}, "query: 2 rows"),
    "heads that do not divide": ({"query": torch.zeros(2, 7, 1, 16)}, "key: .* does not fit the query"),
    "another batch": ({"query": torch.zeros(3, 8, 1, 16)}, "key: .* does not fit the query"),
    "fewer values": ({"value": torch.zeros(2, 2, 39, 16)}, "value: .* does not fit the keys"),
    "values of another dtype": ({"value": torch.zeros(2, 2, 40, 16).bfloat16()}, "key, value: .*bfloat16"),
    "keys with steps": ({"key": torch.zeros(2, 2, 16, 40).transpose(2, 3)}, "key: its last dimension has stride 40"),
    "half a new row": ({"new_value": None}, "only one of them is given"),
    "two new rows": ({"new_key": torch.zeros(2, 2, 2, 16)}, "new_key: .* is no row of"),
    "segments of int32": ({"segments": torch.zeros(2, 1, 2, dtype=torch.int32)}, "segments: .*int32 instead of int64"),
    "segments of one row": ({"segments": torch.zeros(1, 1, 2, dtype=torch.int64)}, "segments: .* instead of int64"),
    "too many segments": ({"segments": torch.zeros(2, 257, 2, dtype=torch.int64)}, "at most 256"),
    "a boolean weigh": ({"weigh": torch.ones(1, dtype=torch.bool)}, "weigh: .* instead of int32"),
    "no capacity": ({"key": torch.zeros(2, 2, 40, 16)}, "no spare row"),
    "a mask of another length": ({"mask": torch.ones(2, 1, 1, 40, dtype=torch.bool)}, "41"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    changed, message = WRONG[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(**changed)


def test_what_is_called_in_the_errors_is_right() -> None:
    call()
    call(new_key=None, new_value=None)


def test_capacity() -> None:
    """A spare row is found exactly where the memory has one that belongs to no other row."""
    buffer = torch.zeros(2, 3, 10, 4)
    assert with_spare_row(buffer[:, :, :9]).shape == (2, 3, 10, 4)
    assert with_spare_row(buffer.transpose(1, 2).reshape(2, 10, 3, 4).transpose(1, 2)[:, :, :9]).shape == (2, 3, 10, 4)
    assert with_spare_row(buffer[:, 1:2, :9]).shape == (2, 1, 10, 4)
    assert with_spare_row(buffer[:1, :1]).shape == (1, 1, 11, 4), "no row of the view itself stands there"
    full = (
        buffer,
        buffer[:, 1:2].expand(-1, 3, -1, -1)[:, :, :9],
        buffer.transpose(1, 2).reshape(2, 10, 3, 4).transpose(1, 2),
        buffer[1:, 2:],
        buffer.view(2, 10, 3, 4).transpose(1, 2),
        torch.zeros(1, 1, 10, 4),
    )
    for view in full:
        with pytest.raises(ValueError, match=r"no spare row behind .* Fix: pass a view of a buffer"):
            with_spare_row(view)


def test_a_device_without_an_implementation() -> None:
    with pytest.raises(NotImplementedError, match=r"avl::partitioned_decode has no implementation for .*'xpu'.* Fix:"):
        implementation("partitioned_decode", IMPLEMENTATIONS, torch.device("xpu"))
