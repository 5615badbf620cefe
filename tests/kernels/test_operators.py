"""Operators that PyTorch's dispatcher calls in C++: what they answer is what Python answers, to the bit."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx.kernels import inherited_decode, latent_decode, partitioned_decode
from avl_fx.kernels.partitioned_decode import native
from avl_fx.kernels.partitioned_decode.schema import MAX_SEGMENTS
from tests._compiler import needs_compiler
from tests.kernels import test_inherited_decode, test_latent_decode, test_partitioned_decode
from tests.kernels.test_inherited_decode import INHERITED, least, without
from tests.kernels.test_partitioned_decode import HALF_OR_SINGLE, LAYOUTS, SHAPES, Case, asked, segments

pytestmark = needs_compiler
DTYPES = (*HALF_OR_SINGLE, torch.float64)
MASKS = ("none", "bool", "additive", "float64", "int64")
TABLES = {
    "partitioned_decode": partitioned_decode.IMPLEMENTATIONS,
    "anchor_decode": inherited_decode.ANCHOR_IMPLEMENTATIONS,
    "inherited_decode": inherited_decode.IMPLEMENTATIONS,
    "latent_decode": latent_decode.IMPLEMENTATIONS,
}
DECODES = ("partitioned_decode", "anchor_decode")  # they take the same


@pytest.fixture(autouse=True, scope="module")
def registered():
    assert native.is_available()
    assert native.is_dispatched()
    for name in TABLES:
        assert "operator.cpp" in torch._C._dispatch_dump(f"avl::{name}")


@pytest.fixture
def through_python(monkeypatch):
    """Names of operators whose calls arrive in Python."""
    seen = []
    for name, table in TABLES.items():

        def spy(*args, name=name, there=table["cpu"]):
            seen.append(name)
            return there(*args)

        monkeypatch.setitem(table, "cpu", spy)
    return seen


def both(name, mine, theirs):
    """What the operator answers, and what Python does, of the same arguments twice; nothing where both refuse."""
    in_python = getattr(torch.ops.avl, f"{name}_in_python")
    try:
        expected = in_python(*theirs)
    except (RuntimeError, ValueError):
        with pytest.raises((RuntimeError, ValueError)):
            getattr(torch.ops.avl, name)(*mine)
        return None
    return getattr(torch.ops.avl, name)(*mine), expected


def strided(tensor):
    """The same numbers with room between them."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def assert_same(one, other):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def assert_same_memory(one, other):
    """Of the whole buffers: the new row is stored, and nothing else."""
    for pair in zip(one, other, strict=True):
        if pair[0] is not None:
            assert_same(*(t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0) for t in pair))


@st.composite
def cases(draw):
    kv_heads = draw(st.integers(1, 3))
    return Case(
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        keys=draw(st.sampled_from([0, 1, 40, 67])),
        head_dim=draw(st.sampled_from([8, 16, 20])),
        value_dim=draw(st.sampled_from([8, 24])),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@st.composite
def masks(draw, case, seen):
    """Makes a mask, or none."""
    kind = draw(st.sampled_from(MASKS))
    shape = (draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, case.heads])), 1, draw(st.sampled_from([1, seen])))
    mask = case.visible(shape[draw(st.integers(0, 3)) :])
    if kind in ("additive", "float64"):
        dtype = torch.float64 if kind == "float64" else case.dtype
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    return {"none": None, "bool": mask, "int64": mask.long()}[kind]


@st.composite
def ranges(draw, shapes):
    """One of them, or none."""
    rows = segments(shapes[draw(st.sampled_from([*shapes]))])
    return draw(st.sampled_from([None, rows, rows, rows, strided(rows)]))


@st.composite
def calls(draw):
    """How to make the arguments of a call: it stores a row, so each of two gets tensors of its own."""
    case, appends, rows = draw(cases()), draw(st.booleans()), draw(ranges(SHAPES))
    weigh = draw(st.sampled_from([None, False, True]))
    mask = draw(masks(case, case.keys + appends))

    def make():
        new = case.new() if appends else (None, None)
        return *case.tensors(), *new, mask, rows, None if weigh is None else asked(weigh), 0.3

    return make


@st.composite
def inheriting_calls(draw):
    """As `calls`, of a lazy layer: with all logits inherited, with some, or with keys in their place."""
    case, appends, rows = draw(cases()), draw(st.booleans()), draw(ranges(SHAPES))
    mode = draw(st.sampled_from(["gla", "vla_scores", "vla"]))
    inherited, seen = INHERITED[draw(st.sampled_from([*INHERITED]))], case.keys + appends
    mask = draw(masks(case, seen))
    count = draw(st.integers(0, least(inherited, case.keys)))
    as_it_is = draw(st.booleans())

    def make():
        query, key, value = case.tensors()
        new = case.new() if appends else (None, None)
        logits = torch.randn(2, case.heads, seen, generator=torch.Generator().manual_seed(5))
        logits = logits if as_it_is else strided(logits)
        if mode == "gla":
            return logits, None, None, value, None, new[1], mask, rows, None, 0.3, None
        anchor_key = case.cache(case.head_dim, 99)[1] if mode == "vla" else None
        own = query, without(key, inherited, count), value, *new
        return None if mode == "vla" else logits, *own, mask, rows, segments(inherited), 0.3, anchor_key

    return make


@st.composite
def latent_calls(draw):
    """As `calls`, of latents: one head of them for all of the query's."""
    drawn, rank = draw(cases()), draw(st.sampled_from([8, 20]))
    case = test_latent_decode.latent_case(
        heads=drawn.heads, keys=drawn.keys, rank=rank, dtype=drawn.dtype, layout=drawn.layout
    )
    appends, rows = draw(st.booleans()), draw(ranges(SHAPES))
    weigh, mask = draw(st.sampled_from([None, False, True])), draw(masks(case, case.keys + appends))

    def make():
        new = test_latent_decode.new(case) if appends else (None, None)
        return *test_latent_decode.tensors(case), *new, mask, rows, None if weigh is None else asked(weigh), 0.3

    return make


@settings(max_examples=150, deadline=None)
@given(make=latent_calls())
def test_latent_decode_is_that_of_python(make):
    assert_decodes_alike("latent_decode", make)


@pytest.mark.parametrize("name", DECODES)
@settings(max_examples=150, deadline=None)
@given(make=calls())
def test_decode_is_that_of_python(name, make):
    """Whatever is appended, named, masked and asked for."""
    assert_decodes_alike(name, make)


def assert_decodes_alike(name, make):
    """Weights are unspecified where nobody asks for them."""
    mine, theirs = make(), make()
    answers = both(name, mine, theirs)
    if answers is None:
        return
    (out, weights, *logits), expected = answers
    assert_same(out, expected[0])
    assert (weights.shape, weights.dtype) == (expected[1].shape, torch.float32)
    if mine[7] is not None and mine[7].item():
        assert_same(weights, expected[1])
    for found, wanted in zip(logits, expected[2:], strict=True):
        assert_same(found, wanted)
    assert_same_memory(mine[1:3], theirs[1:3])


@settings(max_examples=150, deadline=None)
@given(make=inheriting_calls())
def test_inherited_decode_is_that_of_python(make):
    mine, theirs = make(), make()
    answers = both("inherited_decode", mine, theirs)
    if answers is not None:
        assert_same(*answers)
        assert_same_memory(mine[2:4], theirs[2:4])


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_does_not_pass_through_python(dtype, layout, through_python):
    case, ragged, theirs = Case(dtype=dtype, layout=layout), segments(SHAPES["ragged"]), segments(INHERITED["ragged"])
    ops, anchor_key = torch.ops.avl, case.cache(16, 99)[1]
    latent = test_latent_decode.latent_case(heads=8, dtype=dtype, layout=layout)
    for appends in (False, True):
        new = case.new() if appends else (None, None)
        row = test_latent_decode.new(latent) if appends else (None, None)
        logits = torch.zeros(2, 8, 40 + appends)
        for mask in (None, case.visible((2, 1, 1, 40 + appends)), case.visible((40 + appends,)).to(dtype)):
            for rows, weigh in ((None, None), (ragged, asked())):
                for name in DECODES:
                    getattr(ops, name)(*case.tensors(), *new, mask, rows, weigh, 0.3)
                ops.latent_decode(*test_latent_decode.tensors(latent), *row, mask, rows, weigh, 0.3)
                query, key, value = case.tensors()
                ops.inherited_decode(logits, None, None, value, None, new[1], mask, rows, None, 0.3)
                own = query, without(key, INHERITED["ragged"], 8), value, *new, mask, rows, theirs, 0.3
                ops.inherited_decode(logits, *own)
                ops.inherited_decode(None, *own, anchor_key)
    assert not through_python


@pytest.mark.parametrize("name", TABLES)
def test_what_the_kernel_is_not_made_for_is_pythons(name, through_python):
    apart = strided(Case().tensors()[0])
    for case, query in ((Case(dtype=torch.float64), None), (Case(keys=0), None), (Case(), apart)):
        given, before = case.tensors(), len(through_python)
        query = given[0] if query is None else query
        if name == "inherited_decode":
            logits = torch.zeros(2, 8, case.keys + 1)
            rest = *case.new(), None, None, segments(INHERITED["the middle"])
            torch.ops.avl.inherited_decode(logits, query, *given[1:], *rest, 0.3)
        elif name == "latent_decode":
            latent = test_latent_decode.latent_case(heads=8, keys=case.keys, dtype=case.dtype)
            own, *rows = test_latent_decode.tensors(latent)
            own = strided(own) if query is apart else own
            torch.ops.avl.latent_decode(own, *rows, *test_latent_decode.new(latent), None, None, None, 0.3)
        else:
            getattr(torch.ops.avl, name)(query, *given[1:], *case.new(), None, None, None, 0.3)
        assert through_python[before:] == [name]


@pytest.mark.parametrize("name", test_partitioned_decode.WRONG)
@pytest.mark.parametrize("operator", DECODES)
def test_errors_of_decode_keep_their_words(operator, name, through_python):
    changed, message = test_partitioned_decode.WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        test_partitioned_decode.call(getattr(torch.ops.avl, operator), **changed)
    assert not through_python


@pytest.mark.parametrize("name", test_inherited_decode.WRONG)
def test_errors_of_inherited_decode_keep_their_words(name, through_python):
    changed, message = test_inherited_decode.WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        test_inherited_decode.call(**changed)
    assert not through_python


def test_limits_are_those_of_the_schema():
    text = Path(native.__file__).with_name("call.h").read_text("utf-8")
    assert [int(n) for n in re.findall(r"constexpr int64_t MAX_SEGMENTS = (\d+);", text)] == [MAX_SEGMENTS]
