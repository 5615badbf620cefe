"""`avl::narrow_linear`: against float64, with the C++ kernel and without."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx.kernels.narrow_linear import IMPLEMENTATIONS, MAX_ROWS, cpu, is_available, narrow_linear_reference, native
from avl_fx.kernels.narrow_linear.native import narrow_linear_native
from tests._compiler import skip_without_compiler


@pytest.fixture(params=["dispatched", "native", "aten"], autouse=True, scope="module")
def implementation(request):
    """By PyTorch's dispatcher straight to C++, through Python to C++, and to ATen."""
    if request.param != "aten":
        skip_without_compiler()
        assert is_available()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "aten":
            patch.setattr(cpu, "narrow_linear_native", lambda *args: None)
        if request.param == "dispatched":
            assert "operator.cpp" in torch._C._dispatch_dump("avl::narrow_linear")
        patch.setattr(f"{__name__}.called", torch.ops.avl.narrow_linear if request.param == "dispatched" else in_python)
        yield request.param


OPERATOR = Path(native.__file__).with_name("operator.cpp")
in_python = called = torch.ops.avl.narrow_linear_in_python


def narrow_linear(*arguments):
    return called(*arguments)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(rows, features, wide, bias, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(rows, features, generator=generator).to(dtype)
    weight = torch.randn(wide, features, generator=generator).to(dtype)
    return given, weight, torch.randn(wide, generator=generator).to(dtype) if bias else None


def check(given, weight, bias):
    """Float32 as it sums up, and rounded once: half precision too. (ATen's own products of those may round more.)"""
    out, expected = narrow_linear(given, weight, bias), narrow_linear_reference(given, weight, bias)
    assert (out.shape, out.dtype) == (expected.shape, given.dtype)
    assert out.is_contiguous()
    if given.dtype == torch.float32 or narrow_linear_native(given, weight, bias) is not None:
        exact, product = given.double() @ weight.double().t(), given.abs().double() @ weight.abs().double().t()
        exact = exact if bias is None else exact + bias.double()
        once = 0 if given.dtype == torch.float32 else torch.finfo(given.dtype).eps / 2 * exact.abs()
        assert ((out - exact).abs() <= once + 1e-6 * (product + 1)).all()  # rounding errors are relative to these
    else:
        torch.testing.assert_close(out, expected)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, MAX_ROWS + 3),
    st.integers(1, 70),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from(DTYPES),
)
def test_all_sizes(rows, features, wide, bias, seed, dtype):
    check(*tensors(rows, features, wide, bias, seed, dtype))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, MAX_ROWS), st.integers(1, 40), st.sampled_from([1, 19, 2000]), st.integers(1, 9), st.booleans())
def test_any_number_of_threads(rows, wide, features, threads, bias):
    """Each takes its part of the weight, however many rows that leaves for a stream; one takes all of a small one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*tensors(rows, features, wide, bias))
    finally:
        torch.set_num_threads(before)


def test_leading_dimensions_and_strides():
    given, weight, bias = tensors(6, 48, 20, True)
    check(given.view(2, 3, 1, 48).squeeze(2), weight, bias)
    check(given.t().contiguous().t(), weight, bias)
    wide = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    check(given, wide[:, :48], bias)
    check(given, torch.randn(48, 20, generator=torch.Generator().manual_seed(1)).t(), bias)
    check(given, weight, torch.randn(40, generator=torch.Generator().manual_seed(1))[::2])


def test_other_dtypes_are_ordinary_products():
    assert narrow_linear_native(*tensors(3, 48, 20, True, dtype=torch.float64)) is None
    check(*tensors(3, 48, 20, True, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_pays_where_the_processor_has_no_units_for_it(dtype, monkeypatch):
    for units in (False, True):
        monkeypatch.setattr(native, "has_units", lambda dtype, units=units: units)
        assert (native.pays(dtype), native.pays(torch.float32), native.pays(torch.float64)) == (not units, True, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("at_once", [1, 48 * 7, 1 << 22], ids=["a row", "seven", "all"])
def test_many_rows_in_half_precision_are_computed_in_float32(dtype, bias, at_once, monkeypatch):
    """Of some rows of the weight at a time; rounded once, to what few rows give."""
    monkeypatch.setattr(cpu, "WIDENED_AT_ONCE", at_once)
    monkeypatch.setattr(native, "has_units", lambda dtype: False)
    given, weight, added = tensors(MAX_ROWS + 1, 48, 20, bias, dtype=dtype)
    wide = [None if t is None else t.float() for t in (given, weight, added)]
    expected = torch.nn.functional.linear(*wide).to(dtype)
    torch.testing.assert_close(
        narrow_linear(given.view(3, -1, 48), weight, added).flatten(0, 1),
        expected,
        atol=1e-6,
        rtol=torch.finfo(dtype).eps,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_show(dtype):
    given, weight, _ = tensors(2, 48, 20, False, dtype=dtype)
    given[1, 47] = torch.nan
    weight[3] = torch.inf
    out = narrow_linear(given, weight, None)
    assert out[1].isnan().all()
    assert not out[0, 3].isfinite()
    assert out[0, :3].isfinite().all()


def test_the_kernel_serves_few_rows_only(implementation):
    if implementation == "native":
        assert narrow_linear_native(*tensors(MAX_ROWS, 48, 20, True)) is not None
        assert narrow_linear_native(*tensors(MAX_ROWS + 1, 48, 20, True)) is None


def test_shapes_that_do_not_fit_are_errors():
    given, weight, bias = tensors(2, 48, 20, True)
    for wrong in ((given[:, :47], weight, bias), (given, weight, bias[:7]), (given.double(), weight, bias)):
        with pytest.raises(RuntimeError):
            narrow_linear(*wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    for bias in (False, True):
        torch.library.opcheck(torch.ops.avl.narrow_linear.default, tensors(2, 48, 20, bias, dtype=dtype))


def test_the_operator_takes_as_many_rows_as_the_schema_says():
    (limit,) = re.findall(r"constexpr int64_t MAX_ROWS = (\d+);", OPERATOR.read_text("utf-8"))
    assert int(limit) == MAX_ROWS


@pytest.mark.parametrize("implementation", ["dispatched", "native"], indirect=True)
def test_a_bias_of_another_dtype_is_converted(implementation):
    given, weight, bias = tensors(3, 48, 20, True, dtype=torch.bfloat16)
    assert torch.equal(narrow_linear(given, weight, bias.double()), narrow_linear(given, weight, bias))


@pytest.mark.parametrize("implementation", ["dispatched"], indirect=True)
def test_dispatched_calls_do_not_pass_through_python(implementation, monkeypatch):
    """But for what the kernel is not made for."""
    seen = []
    monkeypatch.setitem(IMPLEMENTATIONS, "cpu", lambda *args: seen.append(1) or cpu.narrow_linear_cpu(*args))
    few = tensors(3, 48, 20, True)
    for dtype in DTYPES:
        narrow_linear(*(t.to(dtype) for t in few))
        assert not seen
    strided = few[1].t().contiguous().t()
    others = [tensors(MAX_ROWS + 1, 48, 20, True), (few[0], strided, None), [t.double() for t in few]]
    for count, arguments in enumerate(others, 1):
        check(*arguments)
        assert len(seen) == count
