"""`avl::anchor_decode` and `avl::inherited_decode`: references against float64, implementations against references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_fx.kernels.inherited_decode import (
    ANCHOR_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    anchor_decode_reference,
    cpu,
    inherited_decode_reference,
)
from avl_fx.kernels.partitioned_decode.native import _function
from tests._compiler import skip_without_compiler
from tests.kernels.test_partitioned_decode import (
    DENSE,
    HALF_OR_SINGLE,
    HEADS,
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

SCALE = 0.3
INHERITED: dict[str, Rows] = {
    "all": [DENSE, DENSE],
    "none": [[], []],
    "the middle": [[(4, 20)], [(4, 20)]],
    "ragged": [[(2, 3), (9, 1), (30, 5)], [(0, 12)]],
    "unordered, to the end": [[(33, LARGE), (1, 2)], [(20, 0), (39, 9), (3, 30)]],
}
Inherit = Callable[..., Tensor]


@pytest.fixture(params=["native", "aten"], autouse=True, scope="module")
def cpu_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """All tests run with the C++ kernel, and with what serves where there is no compiler."""
    if request.param == "native":
        skip_without_compiler()
        assert _function() is not None
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "aten":
            patch.setattr(cpu, "partitioned_decode_native", lambda *args, **kwargs: None)
            patch.setattr(cpu, "run", lambda *args, **kwargs: None)
        yield request.param


def covered(rows: Rows, keys: int) -> Tensor:
    """bool ``[batch, 1, 1, keys]``"""
    found = torch.zeros(len(rows), 1, 1, keys, dtype=torch.bool)
    for row, ranges in enumerate(rows):
        for start, length in ranges:
            found[row, ..., start : start + length] = True
    return found


def least(inherited: Rows, keys: int) -> int:
    """How many keys each batch row inherits at least."""
    return int(covered(inherited, keys).sum(3).min())


def without(key: Tensor, inherited: Rows, count: int) -> Tensor:
    """``key`` without the first ``count`` that each batch row inherits; where a cache has room, this one has, too."""
    theirs = covered(inherited, key.shape[2])[:, 0, 0]
    kept = [row[:, ~(flags & (flags.cumsum(0) <= count))] for row, flags in zip(key, theirs, strict=True)]
    buffer = torch.full((*key.shape[:2], key.shape[2] + 3, key.shape[3]), torch.nan, dtype=key.dtype)
    view = buffer[:, :, : key.shape[2] - count]
    return view.copy_(torch.stack(kept))


def joint_truth(case: Case, anchor: Tensor, mask: Tensor | None, rows: Rows, inherited: Rows, seed: int) -> Tensor:
    """One softmax over inherited and own logits, in float64; shares no line with the reference.

    Hands `truth` queries and keys of twice the size: the anchor's against the keys that are inherited, the layer's
    against the rest.
    """
    query, key, value = case.tensors(seed)
    anchor_key = case.cache(case.head_dim, 99)[1]
    theirs = covered(inherited, case.keys)
    both = torch.cat([anchor, query], -1)
    pick = theirs.reshape(-1, 1, case.keys, 1).expand(-1, case.kv_heads, -1, -1)
    halves = [torch.where(pick, anchor_key, 0), torch.where(pick, 0, key)]
    return truth(both, torch.cat(halves, -1), value, mask, rows, SCALE)[0]


def check(
    case: Case,
    rows: Rows | None,
    inherited: Rows | None,
    mask: Tensor | None = None,
    inherit: Inherit = IMPLEMENTATIONS["cpu"],
) -> None:
    """Both layers: what the anchor hands on, and what the lazy layer makes of it."""
    anchor = case.tensors(50)[0]
    anchor_key = case.cache(case.head_dim, 99)[1]
    query, key, value = case.tensors(10)
    ranges = None if rows is None else segments(rows)
    read = [DENSE] * case.batch if rows is None else rows
    _, _, logits = anchor_decode_reference(anchor, anchor_key, value, None, None, mask, ranges, None, SCALE)
    expected = joint_truth(case, anchor, mask, read, inherited or [DENSE] * case.batch, 10)
    own = (None, None) if inherited is None else (query, key)
    theirs = None if inherited is None else segments(inherited)
    for function in (inherited_decode_reference, inherit):
        out = function(logits, *own, value, None, None, mask, ranges, theirs, SCALE)
        assert (out.shape, out.dtype) == (expected.shape, case.dtype)
        assert error(out, expected) <= TOLERANCE[case.dtype]
    if inherited is None:
        return
    # Without keys that are inherited, and with the anchor's keys instead of its logits.
    pick = covered(inherited, case.keys).reshape(-1, 1, case.keys, 1)
    mixed = truth(query, torch.where(pick, anchor_key, key), value, mask, read, SCALE)[0]
    most = least(inherited, case.keys)
    for count in {0, most // 2, most}:
        rest = without(key, inherited, count), value, None, None, mask, ranges, theirs, SCALE
        for function in (inherited_decode_reference, inherit):
            assert error(function(logits, query, *rest), expected) <= TOLERANCE[case.dtype]
            assert error(function(None, query, *rest, anchor_key), mixed) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_the_anchor_hands_on_its_logits(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """And attends as `avl::partitioned_decode` does."""
    case = Case(heads, kv_heads, value_dim=24, dtype=dtype)
    tensors = case.tensors()
    bias = torch.randn(2, heads, 1, 40, generator=torch.Generator().manual_seed(3))
    bias[..., 11] = -torch.inf
    for mask in (None, case.visible((2, heads, 1, 40)), bias):
        for rows in SHAPES.values():
            for ranges in (segments(rows), None):
                expected = anchor_decode_reference(*tensors, None, None, mask, ranges, asked(), SCALE)
                got = ANCHOR_IMPLEMENTATIONS["cpu"](*tensors, None, None, mask, ranges, asked(), SCALE)
                attended = torch.ops.avl.partitioned_decode(*tensors, None, None, mask, ranges, asked(), SCALE)
                for one, other, stock in zip(got, expected, (*attended, expected[2]), strict=True):
                    assert (one.shape, one.dtype) == (other.shape, other.dtype)
                    hidden = other == -torch.inf
                    assert torch.equal(one == -torch.inf, hidden)
                    finite = one.masked_fill(hidden, 0), other.masked_fill(hidden, 0), stock.masked_fill(hidden, 0)
                    assert error(finite[0], finite[1]) <= TOLERANCE[case.dtype]
                    assert error(finite[0], finite[2]) <= TOLERANCE[case.dtype]


def test_the_logits_are_products_in_float64() -> None:
    case = Case()
    query, key, value = case.tensors()
    logits = anchor_decode_reference(query, key, value, None, None, None, None, None, SCALE)[2]
    expected = torch.einsum("bhid,bhjd->bhj", query.double(), key.double().repeat_interleave(4, 1)) * SCALE
    assert error(logits, expected) <= 1e-6


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_dtypes_and_groups(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    case = Case(heads, kv_heads, value_dim=24, dtype=dtype)
    for inherited in (None, INHERITED["the middle"], INHERITED["ragged"]):
        check(case, None, inherited)
        check(case, SHAPES["text, core, text"], inherited, case.visible((2, 1, 1, 40)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ranges(shape: str, layout: str) -> None:
    case = Case(layout=layout)
    check(case, SHAPES[shape], None)
    for inherited in INHERITED.values():
        check(case, SHAPES[shape], inherited)
        check(case, SHAPES[shape], inherited, case.visible((2, 8, 1, 40)))


@pytest.mark.parametrize("keys", [1, 63, 1000])
def test_awkward_lengths(keys: int) -> None:
    case, third = Case(keys=keys), keys // 3
    for inherited in (None, [[(third, third)], [(0, 1)]]):
        check(case, [[(0, third), (keys - third, third)], DENSE], inherited)
        check(case, None, inherited, case.visible((2, 1, 1, keys)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.data(), st.sampled_from([1, 2, 7]))
def test_any_ranges(keys: int, data: st.DataObject, threads: int) -> None:
    cuts = st.lists(st.integers(0, keys), max_size=8, unique=True).map(sorted)

    def ranges() -> list[tuple[int, int]]:
        ends = data.draw(cuts)
        pairs = [(a, b - a) for a, b in zip(ends[::2], ends[1::2], strict=False)]
        return data.draw(st.permutations(pairs)) if pairs else []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        check(Case(keys=keys), [ranges(), ranges()], [ranges(), ranges()])


@pytest.mark.parametrize("inherited", INHERITED)
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_not_needed_may_be_anything(inherited: str, masked: bool) -> None:
    """Keys that are inherited, logits that are not, and all of what no head sees."""
    case, rows = Case(), SHAPES["text, core, text"]
    query, key, value = case.tensors()
    mask = case.visible((2, 1, 1, 40)) if masked else None
    logits = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(5))
    arguments = segments(rows), segments(INHERITED[inherited])
    clean = inherited_decode_reference(logits, query, key, value, None, None, mask, *arguments, SCALE)
    theirs = covered(INHERITED[inherited], 40)[:, 0, 0]
    key[theirs[:, None].expand(2, 2, 40)] = torch.nan
    logits[~theirs[:, None].expand(2, 8, 40)] = torch.nan
    unseen = ~covered(rows, 40)[:, :, 0] | (torch.zeros(1) > 0 if mask is None else ~mask[:, :, 0])
    unseen = unseen.expand(2, 2, 40)
    key[unseen], value[unseen] = torch.nan, torch.inf
    for inherit in (inherited_decode_reference, IMPLEMENTATIONS["cpu"]):
        out = inherit(logits, query, key, value, None, None, mask, *arguments, SCALE)
        assert error(out, clean) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("inherited", INHERITED)
def test_of_keys_of_two_layers_only_what_is_needed_counts(inherited: str) -> None:
    """The anchor's where they are inherited, the layer's own elsewhere."""
    case, ranges = Case(), segments(INHERITED[inherited])
    query, key, value = case.tensors()
    anchor_key = case.cache(case.head_dim, 99)[1]
    rest = value, None, None, None, None, ranges, SCALE
    clean = inherited_decode_reference(None, query, key, *rest, anchor_key)
    theirs = covered(INHERITED[inherited], 40)[:, 0, 0][:, None].expand(2, 2, 40)
    key[theirs], anchor_key[~theirs] = torch.nan, torch.nan
    for inherit in (inherited_decode_reference, IMPLEMENTATIONS["cpu"]):
        assert error(inherit(None, query, key, *rest, anchor_key), clean) <= TOLERANCE[torch.float32]


def test_nan_that_is_needed_shows() -> None:
    case = Case()
    query, key, value = case.tensors()
    logits, theirs = torch.zeros(2, 8, 40), segments(INHERITED["the middle"])
    for inherit in (inherited_decode_reference, IMPLEMENTATIONS["cpu"]):
        for broken in ("logits", "key", "value"):
            given_ = {"logits": logits, "key": key, "value": value}
            given_[broken] = torch.full_like(given_[broken], torch.nan)
            tensors = given_["logits"], query, given_["key"], given_["value"]
            assert inherit(*tensors, None, None, None, None, theirs, SCALE).isnan().all(), broken


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_new_row_is_stored_and_nothing_else(dtype: torch.dtype, own: bool, layout: str) -> None:
    check_new_row(Case(value_dim=24, layout=layout, dtype=dtype), own, IMPLEMENTATIONS["cpu"])


def check_new_row(case: Case, own: bool, inherit: Inherit) -> None:
    query, (new_key, new_value) = case.tensors()[0], case.new()
    buffers, views = zip(*(case.cache(dim, seed) for dim, seed in ((16, 1), (case.value_dim, 2))), strict=True)
    before = [buffer.clone() for buffer in buffers]
    logits = torch.randn(2, 8, 41, generator=torch.Generator().manual_seed(5))
    rows, mask = segments(SHAPES["text, core, text"]), case.visible((2, 1, 1, 41))
    theirs = segments(INHERITED["the middle"]) if own else None
    keys = (query, views[0]) if own else (None, None)
    out = inherit(logits, *keys, views[1], new_key if own else None, new_value, mask, rows, theirs, SCALE)
    stored = [(new_key, buffers[0], before[0])] * own + [(new_value, buffers[1], before[1])]
    for row, buffer, old in stored:
        old[:, :, 40:41] = row
        assert torch.equal(buffer.nan_to_num(5.0), old.nan_to_num(5.0))
    longer = [torch.cat([view, row], 2) for view, row in zip(views, (new_key, new_value), strict=True)]
    keys = (query, longer[0]) if own else (None, None)
    expected = inherited_decode_reference(logits, *keys, longer[1], None, None, mask, rows, theirs, SCALE)
    assert error(out, expected) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_new_row_is_stored_behind_the_keys_that_are_there(dtype: torch.dtype, anchor: bool) -> None:
    check_new_row_of_fewer_keys(Case(value_dim=24, dtype=dtype), anchor, IMPLEMENTATIONS["cpu"])


def check_new_row_of_fewer_keys(case: Case, anchor: bool, inherit: Inherit) -> None:
    (query, key, _), (new_key, new_value) = case.tensors(), case.new()
    values, value = case.cache(case.value_dim, 2)
    anchor_key = case.cache(case.head_dim, 99)[1]
    inherited = INHERITED["ragged"]
    short = without(key, inherited, 8)
    buffer = short.as_strided((2, 2, 43, 16), short.stride())
    before = buffer.clone()
    mask, ranges, theirs = case.visible((2, 1, 1, 41)), segments(SHAPES["text, core, text"]), segments(inherited)
    logits = torch.randn(2, 8, 41, generator=torch.Generator().manual_seed(5))
    inherits = (None, anchor_key) if anchor else (logits, None)
    out = inherit(inherits[0], query, short, value, new_key, new_value, mask, ranges, theirs, SCALE, inherits[1])
    before[:, :, 32:33] = new_key
    assert torch.equal(buffer.nan_to_num(5.0), before.nan_to_num(5.0))
    assert torch.equal(values[:, :, 40:41], new_value)
    # The same with every key where it belongs.
    key, value = torch.cat([key, new_key], 2), torch.cat([value, new_value], 2)
    if anchor:
        pick = covered(inherited, 40).reshape(-1, 1, 40, 1)
        key[:, :, :40] = torch.where(pick, anchor_key, key[:, :, :40])
        theirs, logits = segments([[], []]), torch.zeros(2, 8, 41)
    expected = inherited_decode_reference(logits, query, key, value, None, None, mask, ranges, theirs, SCALE)
    assert error(out, expected) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("own", [False, True])
def test_opcheck_and_symbolic_sizes(own: bool) -> None:
    case = Case()
    query, key, value = case.tensors()
    theirs = segments(INHERITED["the middle"])
    more = (query, key) if own else (None, None)
    logits = torch.zeros(2, 8, 40)
    ranges = segments(SHAPES["ragged"])
    torch.library.opcheck(
        torch.ops.avl.inherited_decode.default,
        (logits, *more, value, None, None, None, ranges, theirs if own else None, SCALE),
    )
    if own:
        fewer = without(key, INHERITED["the middle"], 20), value, None, None, None, ranges, theirs, SCALE, key
        torch.library.opcheck(torch.ops.avl.inherited_decode.default, (None, query, *fewer))
    torch.library.opcheck(
        torch.ops.avl.anchor_decode.default, (query, key, value, None, None, None, ranges, asked(), SCALE)
    )


def call(operator: Any = torch.ops.avl.inherited_decode, **changed: object) -> None:
    case = Case()
    query, key, value = case.tensors()
    new_key, new_value = case.new()
    arguments = {
        "logits": torch.zeros(2, 8, 41),
        "query": query,
        "key": key,
        "value": value,
        "new_key": new_key,
        "new_value": new_value,
        "mask": None,
        "segments": segments(SHAPES["ragged"]),
        "inherited": segments(INHERITED["ragged"]),
        "scale": SCALE,
    }
    operator(**{**arguments, **changed})


NO_KEYS = {"query": None, "key": None, "new_key": None, "inherited": None}
WRONG = {
    "no query": ({"query": None}, "only some are given"),
    "nothing inherited": ({"inherited": None}, "only some are given"),
    "a new key alone": ({**NO_KEYS, "new_key": torch.zeros(2, 2, 1, 16)}, "new_key: without a key"),
    "logits of another length": ({"logits": torch.zeros(2, 8, 40)}, "logits: .* instead of float32"),
    "logits of other heads": ({"logits": torch.zeros(2, 4, 41)}, "logits: .* instead of float32"),
    "heads that do not divide": ({**NO_KEYS, "logits": torch.zeros(2, 7, 41)}, "multiple of 2"),
    "logits in half precision": ({"logits": torch.zeros(2, 8, 41).half()}, "float16 instead of float32"),
    "ranges of int32": ({"inherited": torch.zeros(2, 1, 2, dtype=torch.int32)}, "inherited: .*int32 instead of int64"),
    "too many ranges": ({"inherited": torch.zeros(2, 257, 2, dtype=torch.int64)}, "inherited: 257 a row.*at most 256"),
    "values with steps": (
        {**NO_KEYS, "value": torch.zeros(2, 2, 16, 40).transpose(2, 3)},
        "value: its last dimension has stride 40",
    ),
    "no capacity": ({**NO_KEYS, "value": torch.zeros(2, 2, 40, 16)}, "no spare row"),
    "half a new row": ({"new_value": None}, "only one of them is given"),
    "more keys than values": ({"key": torch.zeros(2, 2, 60, 16)[:, :, :41]}, "41 rows for 40 values"),
    "nothing to inherit": ({"logits": None}, "exactly one of them is inherited"),
    "logits and keys": ({"anchor_key": torch.zeros(2, 2, 40, 16)}, "exactly one of them is inherited"),
    "an anchor without a query": (
        {**NO_KEYS, "logits": None, "anchor_key": torch.zeros(2, 2, 40, 16)},
        "anchor_key: without a query",
    ),
    "too many keys": (
        {"logits": None, "anchor_key": torch.zeros(2, 2, 42, 16)},
        r"anchor_key: \(2, 2, 42, 16\).*instead of \[2, 2, at most 41, 16\]",
    ),
    "keys of another dtype": (
        {"logits": None, "anchor_key": torch.zeros(2, 2, 40, 16).half()},
        "anchor_key: .*float16 .*instead of .*float32",
    ),
    "keys with steps": (
        {"logits": None, "anchor_key": torch.zeros(2, 2, 16, 40).transpose(2, 3)},
        "anchor_key: its last dimension has stride 40",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    changed, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(torch.ops.avl.inherited_decode_in_python, **changed)


def test_what_is_called_in_the_errors_is_right() -> None:
    call()
    call(**NO_KEYS)
