"""`avl::latent_decode`: the reference against float64, the implementations against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_fx.kernels.latent_decode import IMPLEMENTATIONS, cpu, latent_decode, latent_decode_reference
from avl_fx.kernels.partitioned_decode.native import _function
from tests._compiler import skip_without_compiler
from tests.kernels.test_inherited_decode import covered
from tests.kernels.test_partitioned_decode import (
    DENSE,
    HALF_OR_SINGLE,
    LARGE,
    LAYOUTS,
    SHAPES,
    TOLERANCE,
    Case,
    Rows,
    asked,
    error,
    segments,
    truth,
)

Attend = Callable[..., tuple[Tensor, Tensor]]

ROPE = 8
SCALE = 0.3


@pytest.fixture(params=["native", "aten"], autouse=True, scope="module")
def cpu_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """All tests run with the C++ kernel, and with what serves where there is no compiler, and on a GPU."""
    if request.param == "native":
        skip_without_compiler()
        assert _function() is not None
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "aten":
            patch.setattr(cpu, "run", lambda *args, **kwargs: None)
        yield request.param


def latent_case(**sizes: Any) -> Case:
    """`Case.value_dim` is the rank, and `Case.head_dim` the length of a query."""
    rank = sizes.pop("rank", 24)
    return Case(kv_heads=1, head_dim=rank + ROPE, value_dim=rank, **sizes)


def tensors(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, latents and rotated keys; the caches are views of buffers whose other rows are NaN."""
    rope = case.head_dim - case.value_dim
    return case.tensors(seed)[0], case.cache(case.value_dim, seed + 1)[1], case.cache(rope, seed + 2)[1]


def new(case: Case, seed: int = 7) -> tuple[Tensor, Tensor]:
    """The row of one more token."""
    generator = torch.Generator().manual_seed(seed)
    dims = case.value_dim, case.head_dim - case.value_dim
    rows = [torch.randn(case.batch, 1, 1, dim, generator=generator).to(case.dtype) for dim in dims]
    return rows[0], rows[1]


def check(
    case: Case,
    rows: Rows | None,
    mask: Tensor | None = None,
    appends: bool = False,
    implementations: Sequence[Attend] = (IMPLEMENTATIONS["cpu"], torch.ops.avl.latent_decode),
) -> None:
    """Reference and implementations against float64; what they store, too."""
    ranges = None if rows is None else segments(rows)
    query, latents, rotated = tensors(case)
    added = new(case) if appends else (None, None)
    if appends:
        latents, rotated = (torch.cat(both, 2) for both in zip((latents, rotated), added, strict=True))  # type: ignore[arg-type]
    key = torch.cat([latents, rotated], 3)
    expected = truth(query, key, latents, mask, [DENSE] * case.batch if rows is None else rows, SCALE)
    for attend in (latent_decode_reference, *implementations):
        for weigh in (asked(), asked(False), None):
            stored = tensors(case)[1:]
            out, weights = attend(query, *stored, *added, mask, ranges, weigh, SCALE)
            assert (out.shape, out.dtype) == (expected[0].shape, case.dtype)
            assert error(out, expected[0]) <= TOLERANCE[case.dtype]
            assert weights.dtype == torch.float32
            assert weights.shape == (case.batch, 1, 0 if weigh is None else case.keys + appends)
            if weigh is not None and weigh:
                assert error(weights, expected[1]) <= TOLERANCE[torch.float32]
            if appends:
                longer = [t.as_strided((*t.shape[:2], case.keys + 1, t.shape[3]), t.stride()) for t in stored]
                assert torch.equal(longer[0], latents)
                assert torch.equal(longer[1], rotated)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize("heads", [1, 4, 6])
def test_dtypes_and_heads(dtype: torch.dtype, heads: int) -> None:
    case = latent_case(heads=heads, dtype=dtype)
    for name in ("dense", "text, core, text", "ragged"):
        check(case, SHAPES[name])
        check(case, SHAPES[name], case.visible((2, 1, 1, 40)))
        check(case, SHAPES[name], torch.randn(2, heads, 1, 40, generator=torch.Generator().manual_seed(3)))
    check(case, None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_ranges_and_rows_that_are_stored(shape: str, appends: bool, layout: str) -> None:
    case = latent_case(heads=6, layout=layout)
    check(case, SHAPES[shape], appends=appends)
    check(case, SHAPES[shape], case.visible((2, 6, 1, 40 + appends)), appends)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from([8, 20, 64, 72, 128]),
    st.sampled_from(HALF_OR_SINGLE),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 200)), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([1, 2, 5]),
)
def test_whole_tiles_and_what_is_left_of_them(
    heads: int, rank: int, dtype: torch.dtype, gaps: list[tuple[int, int]], masked: bool, threads: int
) -> None:
    """Ranges of many keys, any number of heads, rows that fill no whole vector; threads share them unevenly."""
    ranges, end = [], 0
    for gap, length in gaps:
        ranges.append((end + gap, length))
        end += gap + length
    case = latent_case(heads=heads, keys=end, rank=rank, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        check(case, [ranges, ranges[:1]], case.visible((2, 1, 1, end)) if masked else None)


@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
def test_what_is_not_read_may_be_anything(boolean: bool) -> None:
    case = latent_case(heads=4)
    rows: Rows = [[(0, 3), (20, LARGE)], [(4, 20)]]
    visible = case.visible((2, 1, 1, 40))
    mask = visible if boolean else torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    clean = latent_decode_reference(*tensors(case), None, None, mask, segments(rows), asked(), SCALE)
    query, latents, rotated = tensors(case)
    unread = ~(visible & covered(rows, 40))[:, 0, 0]
    for cache in (latents, rotated):
        cache[:, 0][unread] = torch.nan
    out, weights = IMPLEMENTATIONS["cpu"](query, latents, rotated, None, None, mask, segments(rows), asked(), SCALE)
    assert error(out, clean[0]) <= TOLERANCE[torch.float32]
    assert error(weights, clean[1]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("broken", ["latents", "rotated"])
def test_nan_that_is_read_shows(broken: str) -> None:
    query, latents, rotated = tensors(latent_case(heads=4))
    (latents if broken == "latents" else rotated).fill_(torch.nan)
    for attend in (latent_decode_reference, IMPLEMENTATIONS["cpu"]):
        out, _ = attend(query, latents, rotated, None, None, None, segments([DENSE, DENSE]), asked(False), SCALE)
        assert out.isnan().all()


def call(operator: Callable[..., Any] = latent_decode, **changed: Any) -> Any:
    case = latent_case(heads=4)
    names = "query", "latents", "rotated", "new_latents", "new_rotated"
    given = dict(zip(names, (*tensors(case), *new(case)), strict=True))
    given |= {"mask": None, "segments": segments([DENSE, DENSE]), "weigh": asked(), "scale": SCALE}
    return operator(*(given | changed).values())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two queries": ({"query": torch.zeros(2, 4, 2, 32)}, "query: 2 rows"),
    "a short query": ({"query": torch.zeros(2, 4, 1, 31)}, r"query: 31 elements instead of 24 \+ 8"),
    "another batch": ({"query": torch.zeros(3, 4, 1, 32)}, "do not fit together"),
    "heads of their own": ({"latents": torch.zeros(2, 2, 40, 24)}, "do not fit together"),
    "fewer rotated keys": ({"rotated": torch.zeros(2, 1, 39, 8)}, "do not fit together"),
    "another dtype": ({"rotated": torch.zeros(2, 1, 40, 8).bfloat16()}, "latents, rotated: .*bfloat16"),
    "latents with steps": ({"latents": torch.zeros(2, 1, 24, 40).transpose(2, 3)}, "last dimension has stride 40"),
    "half a new row": ({"new_rotated": None}, "only one of them is given"),
    "two new rows": ({"new_latents": torch.zeros(2, 1, 2, 24)}, "new_latents: .* is no row of"),
    "segments of int32": ({"segments": torch.zeros(2, 1, 2, dtype=torch.int32)}, "segments: .*int32 instead of int64"),
    "a boolean weigh": ({"weigh": torch.ones(1, dtype=torch.bool)}, "weigh: .* instead of int32"),
    "no capacity": ({"latents": torch.zeros(2, 1, 40, 24)}, "no spare row"),
    "a mask of another length": ({"mask": torch.ones(2, 1, 1, 40, dtype=torch.bool)}, "41"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("operator", [latent_decode, torch.ops.avl.latent_decode], ids=["python", "dispatcher"])
def test_errors(name: str, operator: Callable[..., Any]) -> None:
    changed, message = WRONG[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(operator, **changed)


def test_what_is_called_in_the_errors_is_right() -> None:
    call()
    call(new_latents=None, new_rotated=None)


def test_a_device_without_an_implementation() -> None:
    meta = [t.to("meta") for t in tensors(latent_case(heads=4))]
    with pytest.raises(NotImplementedError, match="latent_decode has no implementation for device type 'meta'"):
        latent_decode(*meta, None, None, None, None, None, SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranged", [False, True])
def test_opcheck(ranged: bool, dtype: torch.dtype) -> None:
    case = latent_case(heads=4, dtype=dtype)
    rest = (segments(SHAPES["ragged"]), asked()) if ranged else (None, None)
    torch.library.opcheck(
        torch.ops.avl.latent_decode.default,
        (*tensors(case), None, None, case.visible((2, 1, 1, 40)), *rest, SCALE),
    )
