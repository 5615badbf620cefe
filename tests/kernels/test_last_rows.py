"""`avl::last_rows`: the reference against float64, the implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_fx.kernels.last_rows import IMPLEMENTATIONS, last_rows_reference

TOLERANCE = 3e-6
SCALE, HEAD_DIM, BATCH = 0.3, 16, 2
SCORES = (last_rows_reference, IMPLEMENTATIONS["cpu"])


def operands(
    heads: int = 8,
    kv_heads: int = 2,
    queries: int = 9,
    keys: int = 9,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, heads, queries, HEAD_DIM, generator=generator)
    return query.to(dtype), torch.randn(BATCH, kv_heads, keys, HEAD_DIM, generator=generator).to(dtype)


def truth(
    query: Tensor, key: Tensor, mask: Tensor | None, counted: Tensor | None, positions: Tensor | None, causal: bool
) -> Tensor:
    """The whole attention matrix in float64, then one row of it; shares no line with the reference."""
    (batch, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    logits = (
        torch.einsum("bhid,bhjd->bhij", query.double(), key.double().repeat_interleave(heads // kv_heads, 1)) * SCALE
    )
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        logits = logits + mask.double()
    weights = torch.where(allowed.expand(batch, heads, queries, keys), logits, -torch.inf).softmax(-1).nan_to_num(0.0)
    rows = torch.zeros(batch, heads, keys, dtype=torch.float64)
    for row in range(batch):
        real = list(range(queries))
        if counted is not None:
            shown = counted if counted.dtype == torch.bool else counted > torch.finfo(counted.dtype).min / 2
            size = counted.shape[-1]
            visible = shown.expand(batch, shown.shape[1], queries, size)[row, :, -1].any(0)
            at = torch.arange(size - queries, size) if positions is None else positions
            real = [i for i in real if 0 <= at[i] < size and visible[at[i]]]
        if real:
            rows[row] = weights[row, :, real[-1]]
    return rows


def check(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    counted: Tensor | None = None,
    positions: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    expected = truth(query, key, mask, counted, positions, causal)
    for score in SCORES:
        rows = score(query, key, mask, counted, positions, SCALE, causal)
        assert (rows.shape, rows.dtype) == (expected.shape, torch.float32)
        assert not rows.isnan().any()
        assert (rows - expected).abs().max() <= TOLERANCE
    return expected


def padded(left: list[int], right: list[int], queries: int = 9, spare: int = 0, past: int = 0) -> Tensor:
    """A causal mask ``[batch, 1, queries, keys]`` in which padding is hidden as a key, and sees itself on the left."""
    keys = past + queries + spare
    at, key = torch.arange(past, past + queries)[:, None], torch.arange(keys)
    mask = torch.zeros(len(left), 1, queries, keys, dtype=torch.bool)
    for row, (first, behind) in enumerate(zip(left, right, strict=True)):
        mask[row, 0] = ((key <= at) & (key >= first) & (key < past + queries - behind)) | ((key == at) & (at < first))
    return mask


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1)])
def test_dtypes_and_groups(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    tensors = operands(heads, kv_heads, dtype=dtype)
    check(*tensors)
    rows = check(*tensors, causal=True)
    torch.testing.assert_close(rows.sum(-1), torch.ones(BATCH, heads, dtype=torch.float64))
    mask = padded([0, 4], [0, 0])
    check(*tensors, mask, mask)
    check(*tensors, additive(mask), additive(mask))


@pytest.mark.parametrize("length", [1, 63, 1000])
def test_awkward_lengths(length: int) -> None:
    tensors = operands(4, 2, length, length)
    check(*tensors, causal=True)
    mask = padded([length // 3, 0], [0, length // 4], length)
    check(*tensors, mask, mask)


def test_padding_behind_the_prompt_is_passed_over() -> None:
    query, key = operands()
    mask = padded([0, 0], [0, 4])
    rows = check(query, key, mask, mask)
    alone = truth(query[1:, :, :5], key[1:, :, :5], None, None, None, True)
    assert (rows[1:, :, :5] - alone).abs().max() <= TOLERANCE
    assert not rows[1, :, 5:].any()


def test_another_layers_mask_says_which_query_is_last() -> None:
    """A window hides the prompt from padding behind it: by its own mask no query would be real."""
    query, key = operands()
    full = padded([0, 0], [0, 4])
    at = torch.arange(9)
    window = full & (at > at[:, None] - 3)
    assert not window[1, 0, -1].any()
    rows = check(query, key, window, full)
    assert rows[1].sum() == pytest.approx(8)
    assert not check(query, key, window, window)[1].any()


def test_a_static_cache() -> None:
    query, key = operands(keys=9 + 6 + 5)
    key[:, :, 15:] = 7.0  # capacity
    mask, positions = padded([0, 2], [0, 0], spare=5, past=6), torch.arange(6, 15)
    rows = check(query, key, mask, mask, positions)
    assert not rows[..., 15:].any()
    check(query, key, additive(mask), additive(mask), positions)


def test_no_real_query() -> None:
    query, key = operands()
    mask = padded([0, 0], [0, 0])
    mask[1] = False
    rows = check(query, key, mask, mask)
    assert rows[0].any()
    assert not rows[1].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 4), st.integers(0, 4), st.sampled_from((1, 4)))
def test_any_mask(seed: int, queries: int, past: int, spare: int, mask_heads: int) -> None:
    """The rule for the last real query, under masks without any structure."""
    keys = past + queries + spare
    generator = torch.Generator().manual_seed(seed)
    mask, counted = (torch.rand(BATCH, mask_heads, queries, keys, generator=generator) > 0.4 for _ in range(2))
    check(*operands(4, 2, queries, keys, seed=seed), mask, counted, torch.arange(past, past + queries))


@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(kind: str, dtype: torch.dtype) -> None:
    mask = {"causal": None, "bool": padded([0, 2], [0, 0]), "additive": additive(padded([0, 2], [0, 0]))}[kind]
    arguments = (*operands(dtype=dtype), mask, mask, torch.arange(9), SCALE, kind == "causal")
    torch.library.opcheck(torch.ops.avl.last_rows.default, arguments)


def test_fake_shapes_are_symbolic() -> None:
    """Prompts of other lengths do not compile anew."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda query, key: torch.ops.avl.last_rows(query, key, None, None, None, SCALE, True),
        backend="aot_eager",
        dynamic=True,
        fullgraph=True,
    )
    for number, length in enumerate((9, 12, 30)):
        tensors = operands(queries=length, keys=length)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            assert (compiled(*tensors) - truth(*tensors, None, None, None, True)).abs().max() <= TOLERANCE


WRONG = {
    "another head dim": ({"key": torch.zeros(2, 2, 9, 8)}, "key: .* does not fit the query"),
    "heads that do not divide": ({"key": torch.zeros(2, 3, 9, 16)}, "key: .* does not fit the query"),
    "keys of another dtype": ({"key": torch.zeros(2, 2, 9, 16).half()}, "key: torch.float16"),
    "mask and causal": ({"mask": torch.ones(2, 1, 9, 9, dtype=torch.bool), "is_causal": True}, "mask: .* is_causal"),
    "a mask of other keys": ({"mask": torch.ones(2, 1, 9, 8, dtype=torch.bool)}, "mask: .* does not broadcast"),
    "a mask of another batch": (
        {"counted": torch.ones(3, 1, 9, 9, dtype=torch.bool)},
        "counted: .* does not broadcast",
    ),
    "a position for each key": ({"positions": torch.arange(10)}, "positions: .* instead of int64"),
    "positions of int32": ({"positions": torch.arange(9, dtype=torch.int32)}, "positions: .*int32 instead of int64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    changed, message = WRONG[name]
    query, key = operands()
    rest = {"mask": None, "counted": None, "positions": None, "scale": SCALE, "is_causal": False}
    with pytest.raises(ValueError, match=message):
        torch.ops.avl.last_rows(**{"query": query, "key": key, **rest, **changed})
