"""Operators that PyTorch's dispatcher calls in C++: what they answer is what Python answers, to the bit."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx.kernels.partitioned_decode import IMPLEMENTATIONS, native
from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from tests._compiler import needs_compiler
from tests.kernels.test_partitioned_decode import HALF_OR_SINGLE, LAYOUTS, SHAPES, WRONG, Case, asked, call, segments

pytestmark = needs_compiler
DTYPES = (*HALF_OR_SINGLE, torch.float64)
MASKS = ("none", "bool", "additive", "float64", "int64")


@pytest.fixture(autouse=True, scope="module")
def registered():
    assert native.is_available()
    assert "operator.cpp" in torch._C._dispatch_dump("avl::partitioned_decode")


@pytest.fixture
def through_python(monkeypatch):
    """Calls that arrive in Python."""
    seen = []
    there = IMPLEMENTATIONS["cpu"]
    monkeypatch.setitem(IMPLEMENTATIONS, "cpu", lambda *args: seen.append(1) or there(*args))
    return seen


@st.composite
def calls(draw):
    """A case, and how to make its arguments: a call stores a row, so each of two gets tensors of its own."""
    kv_heads = draw(st.integers(1, 3))
    case = Case(
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        keys=draw(st.sampled_from([0, 1, 40, 67])),
        head_dim=draw(st.sampled_from([8, 16, 20])),
        value_dim=draw(st.sampled_from([8, 24])),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
    )
    appends, ranged = draw(st.booleans()), draw(st.booleans())
    rows = SHAPES[draw(st.sampled_from([*SHAPES]))] if ranged else None
    weigh = draw(st.sampled_from([None, False, True]))
    kind, seen = draw(st.sampled_from(MASKS)), case.keys + appends
    shape = (draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, case.heads])), 1, draw(st.sampled_from([1, seen])))
    shape = shape[draw(st.integers(0, 3)) :]

    def make():
        new = case.new() if appends else (None, None)
        mask = None if kind == "none" else case.visible(shape)
        if kind in ("additive", "float64"):
            dtype = torch.float64 if kind == "float64" else case.dtype
            mask = torch.zeros(shape, dtype=dtype).masked_fill(~mask, -torch.inf)
        elif kind == "int64":
            mask = mask.long()
        ranges = None if rows is None else segments(rows)
        return *case.tensors(), *new, mask, ranges, None if weigh is None else asked(weigh), 0.3

    return make


@settings(max_examples=150, deadline=None)
@given(calls())
def test_decode_is_that_of_python(make):
    """Whatever is appended, named, masked and asked for; weights are unspecified where nobody asks for them."""
    mine, theirs = make(), make()
    try:
        expected = torch.ops.avl.partitioned_decode_in_python(*theirs)
    except (RuntimeError, ValueError):
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.avl.partitioned_decode(*mine)
        return
    found = torch.ops.avl.partitioned_decode(*mine)
    assert torch.equal(found[0].nan_to_num(7.0), expected[0].nan_to_num(7.0))
    assert (found[1].shape, found[1].dtype) == (expected[1].shape, torch.float32)
    if mine[7] is not None and mine[7].item():
        assert torch.equal(found[1].nan_to_num(7.0), expected[1].nan_to_num(7.0))
    for one, other in zip(mine[1:3], theirs[1:3], strict=True):
        memory = [t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0) for t in (one, other)]
        assert torch.equal(memory[0].nan_to_num(7.0), memory[1].nan_to_num(7.0)), "the row, and nothing else"


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_does_not_pass_through_python(dtype, layout, through_python):
    case = Case(dtype=dtype, layout=layout)
    for appends in (False, True):
        new = case.new() if appends else (None, None)
        for mask in (None, case.visible((2, 1, 1, 40 + appends)), case.visible((40 + appends,)).to(dtype)):
            for ranges, weigh in ((None, None), (segments(SHAPES["ragged"]), asked())):
                torch.ops.avl.partitioned_decode(*case.tensors(), *new, mask, ranges, weigh, 0.3)
    assert not through_python


def test_decode_of_what_the_kernel_is_not_made_for_is_pythons(through_python):
    strided = torch.randn(2, 16, 1, 8).permute(0, 3, 2, 1)
    assert strided.shape == Case().tensors()[0].shape
    for case, query in ((Case(dtype=torch.float64), None), (Case(keys=0), None), (Case(), strided)):
        given, before = case.tensors(), len(through_python)
        query = given[0] if query is None else query
        torch.ops.avl.partitioned_decode(query, *given[1:], *case.new(), None, None, None, 0.3)
        assert len(through_python) == before + 1


@pytest.mark.parametrize("name", WRONG)
def test_errors_keep_their_words(name, through_python):
    changed, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        call(**changed)
    assert not through_python


def test_limits_are_those_of_the_schema():
    text = Path(native.__file__).with_name("operator.cpp").read_text("utf-8")
    assert [int(n) for n in re.findall(r"constexpr int64_t MAX_SEGMENTS = (\d+);", text)] == [MAX_SEGMENTS]
