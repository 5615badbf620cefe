"""`avl::narrow_linear`: against float64, with the C++ kernel and without."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_fx.kernels.narrow_linear import MAX_ROWS, cpu, is_available, narrow_linear_reference
from avl_fx.kernels.narrow_linear.native import narrow_linear_native
from tests._compiler import skip_without_compiler

narrow_linear = torch.ops.avl.narrow_linear


@pytest.fixture(params=["native", "aten"], autouse=True, scope="module")
def implementation(request):
    if request.param == "native":
        skip_without_compiler()
        assert is_available()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "aten":
            patch.setattr(cpu, "narrow_linear_native", lambda *args: None)
        yield request.param


def tensors(rows, features, wide, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(rows, features, generator=generator)
    weight = torch.randn(wide, features, generator=generator)
    return given, weight, torch.randn(wide, generator=generator) if bias else None


def check(given, weight, bias):
    out, expected = narrow_linear(given, weight, bias), narrow_linear_reference(given, weight, bias)
    assert (out.shape, out.dtype) == (expected.shape, given.dtype)
    assert out.is_contiguous()
    if given.dtype == torch.float32:
        bound = given.abs().double() @ weight.abs().double().t() + 1  # rounding errors are relative to these
        assert ((out - expected).abs() <= 1e-6 * bound).all()
    else:
        torch.testing.assert_close(out, expected)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, MAX_ROWS + 3), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_all_sizes(rows, features, wide, bias, seed):
    check(*tensors(rows, features, wide, bias, seed))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_ordinary_products(dtype):
    check(*(t.to(dtype) for t in tensors(3, 48, 20, True)))


def test_nan_and_infinity_show():
    given, weight, _ = tensors(2, 48, 20, False)
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


def test_opcheck():
    for bias in (False, True):
        torch.library.opcheck(narrow_linear.default, tensors(2, 48, 20, bias))
