"""`avl::visual_scores`: the reference against float64, the implementations against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_fx.kernels.visual_scores import IMPLEMENTATIONS, visual_scores_reference

TOLERANCE = 3e-6
"""Largest error over largest value. Products of half precision are exact in float32, and so is the result."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HEADS = ((4, 4), (8, 2), (6, 1))


@dataclass(frozen=True)
class Case:
    """Sizes of one call. `spare` keys stand behind the prompt, as in a static cache."""

    heads: int = 8
    kv_heads: int = 2
    queries: int = 9
    past: int = 0
    spare: int = 0
    head_dim: int = 16
    batch: int = 2
    dtype: torch.dtype = torch.float32

    @property
    def keys(self) -> int:
        return self.past + self.queries + self.spare

    @property
    def positions(self) -> Tensor:
        """Where the queries stand."""
        return torch.arange(self.past, self.past + self.queries)

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Query and key."""
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(self.batch, self.heads, self.queries, self.head_dim, generator=generator)
        key = torch.randn(self.batch, self.kv_heads, self.keys, self.head_dim, generator=generator)
        return query.to(self.dtype), key.to(self.dtype)

    def padded(self, left: list[int], right: list[int]) -> Tensor:
        """A causal mask in which padding is hidden as a key; what padding sees itself is its own business."""
        at, key = self.positions[:, None], torch.arange(self.keys)
        mask = torch.zeros(self.batch, 1, self.queries, self.keys, dtype=torch.bool)
        for row in range(self.batch):
            real = (key >= left[row]) & (key < self.past + self.queries - right[row])
            mask[row, 0] = (key <= at) & real
            # Padding on the left that sees no key at all would have no softmax: it sees itself.
            mask[row, 0] |= (key == at) & (at < left[row])
        return mask


def additive(mask: Tensor, dtype: torch.dtype = torch.float32, lowest: float | None = None) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min if lowest is None else lowest)


def truth(
    query: Tensor, key: Tensor, mask: Tensor | None, positions: Tensor | None, scale: float, causal: bool, window: int
) -> Tensor:
    """The whole attention matrix in float64, then the mean of its last real rows; shares no line with the reference."""
    (batch, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    logits = torch.einsum("bhid,bhjd->bhij", query.double(), key.double().repeat_interleave(heads // kv_heads, 1))
    logits = logits * scale
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    if mask is not None and mask.dtype != torch.bool:
        logits = logits + mask.double()
        allowed = allowed & (mask > torch.finfo(mask.dtype).min / 2)
    allowed = allowed.expand(batch, heads, queries, keys)
    weights = torch.where(allowed, logits, -torch.inf).softmax(-1).nan_to_num(0.0)
    at = torch.arange(keys - queries, keys) if positions is None else positions
    scores = torch.zeros(batch, kv_heads, keys, dtype=torch.float64)
    for row in range(batch):
        visible = allowed[row, :, -1].any(0)
        real = [i for i in range(queries) if 0 <= at[i] < keys and visible[at[i]]]
        if real:
            scores[row] = weights[row, :, real[-window:]].mean(1).unflatten(0, (kv_heads, -1)).mean(1)
    return scores


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value; NaN counts as infinite."""
    difference = (actual.double() - expected.double()).abs().max().item()
    return float("inf") if difference != difference else difference / max(expected.double().abs().max().item(), 1e-30)


def check(
    case: Case,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int = 1,
    positions: Tensor | None = None,
    scale: float = 0.3,
    implementation: Callable[..., Tensor] = IMPLEMENTATIONS["cpu"],
) -> Tensor:
    """The reference and an implementation against float64."""
    arguments = (*case.tensors(), mask, positions, scale, causal, window)
    expected = truth(*arguments)
    for score in (visual_scores_reference, implementation):
        scores = score(*arguments)
        assert (scores.shape, scores.dtype) == ((case.batch, case.kv_heads, case.keys), torch.float32)
        assert error(scores, expected) <= TOLERANCE
    return expected


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_dtypes_and_groups(dtype: torch.dtype, heads: int, kv_heads: int, window: int) -> None:
    case = Case(heads, kv_heads, dtype=dtype)
    check(case, window=window)
    check(case, causal=True, window=window)
    check(case, case.padded([0, 4], [0, 0]), window=window)
    check(case, additive(case.padded([0, 0], [3, 0])), window=window)


@pytest.mark.parametrize("queries", [1, 63, 1000])
def test_awkward_lengths(queries: int) -> None:
    case = Case(4, 2, queries, batch=1)
    for window in (1, 5):
        check(case, causal=True, window=window)
        check(case, case.padded([queries // 3], [queries // 4]), window=window)


@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
@pytest.mark.parametrize("window", [1, 2, 6])
def test_padding_does_not_score(boolean: bool, window: int) -> None:
    """A padded prompt scores as it would alone; the newest real query scores, wherever it stands."""
    case = Case(batch=3)
    mask = case.padded([0, 5, 0], [0, 0, 6])
    scores = check(case, mask if boolean else additive(mask), window=window)
    torch.testing.assert_close(scores.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    query, key = case.tensors()
    for row, kept in ((1, slice(5, 9)), (2, slice(0, 3))):
        alone = truth(query[row : row + 1, :, kept], key[row : row + 1, :, kept], None, None, 0.3, True, window)
        assert error(scores[row : row + 1, :, kept], alone) <= TOLERANCE


@pytest.mark.parametrize("window", [1, 4])
def test_a_later_turn_in_a_static_cache(window: int) -> None:
    """Queries stand at positions in the middle: keys before them are seen, those behind are capacity."""
    case = Case(past=6, spare=7)
    mask = case.padded([0, 2], [0, 0])
    check(case, mask, window=window, positions=case.positions)
    check(case, additive(mask, lowest=-torch.inf), window=window, positions=case.positions)
    query, key = case.tensors()
    key[:, :, 15:] = torch.nan  # never stored
    for score in (visual_scores_reference, IMPLEMENTATIONS["cpu"]):
        for given_mask in (mask, additive(mask, lowest=-torch.inf)):
            assert not score(query, key, given_mask, case.positions, 0.3, False, window).isnan().any()


def test_masks_of_every_broadcast_shape_and_dtype() -> None:
    case = Case()
    for shape in ((1, 1), (2, 1), (1, 8), (2, 8)):
        generator = torch.Generator().manual_seed(sum(shape))
        visible = torch.rand((*shape, 9, 9), generator=generator) > 0.3
        visible[..., 0] = True
        check(case, visible, window=3)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            check(case, additive(visible, dtype), window=3)


def test_visible_through_any_head() -> None:
    """Keys that only one head sees are visible all the same, and the query that stands there scores."""
    case = Case()
    mask = case.padded([0, 0], [2, 2]).expand(2, 8, 9, 9).clone()
    mask[1, 5, -1, 7] = True
    mask[:, :, :, 0] = True
    check(case, mask, window=1)
    check(case, mask, window=3)


def test_no_real_query() -> None:
    """A batch row whose visible keys all lie before the queries, and one that sees nothing."""
    case = Case(past=4)
    mask = torch.zeros(2, 1, 9, 13, dtype=torch.bool)
    mask[0, ..., :3] = True
    scores = check(case, mask, window=2, positions=case.positions)
    assert not scores.any()


@pytest.mark.parametrize(("queries", "past"), [(9, 0), (4, 5), (9, -4)])
def test_the_causal_flag_is_aligned_upper_left(queries: int, past: int) -> None:
    for window in (1, 3):
        check(Case(queries=queries, past=past), causal=True, window=window)
        check(Case(queries=queries, past=past), window=window)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(0, 4), st.integers(0, 4), st.integers(1, 6))
def test_any_mask(seed: int, queries: int, past: int, spare: int, window: int) -> None:
    """The rule for real queries, under masks without any structure."""
    case = Case(4, 2, queries, past, spare)
    visible = torch.rand(2, 1, queries, case.keys, generator=torch.Generator().manual_seed(seed)) > 0.4
    check(case, visible, window=window, positions=case.positions)
    if spare == 0:
        check(case, additive(visible), window=window) if visible.any(-1).all() else None


def test_strided_operands() -> None:
    query, key = Case(spare=3).tensors()
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = torch.cat([key, key], 3)[:, :, :9, :16]
    expected = truth(query, key, None, None, 0.3, True, 2)
    for score in (visual_scores_reference, IMPLEMENTATIONS["cpu"]):
        assert error(score(query, key, None, None, 0.3, True, 2), expected) <= TOLERANCE


@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(kind: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    mask = {"causal": None, "bool": case.padded([0, 2], [0, 0]), "additive": additive(case.padded([0, 2], [0, 0]))}
    arguments = (*case.tensors(), mask[kind], case.positions, 0.3, kind == "causal", 2)
    torch.library.opcheck(torch.ops.avl.visual_scores.default, arguments)


def test_fake_shapes_are_symbolic() -> None:
    """Prompts of other lengths do not compile anew."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda query, key: torch.ops.avl.visual_scores(query, key, None, None, 0.3, True, 2),
        backend="aot_eager",
        dynamic=True,
        fullgraph=True,
    )
    for number, queries in enumerate((9, 12, 30)):
        query, key = Case(queries=queries).tensors()
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            assert error(compiled(query, key), truth(query, key, None, None, 0.3, True, 2)) <= TOLERANCE


WRONG = {
    "another head dim": ({"key": torch.zeros(2, 2, 9, 8)}, "key: .* does not fit the query"),
    "heads that do not divide": ({"key": torch.zeros(2, 3, 9, 16)}, "key: .* does not fit the query"),
    "keys of another dtype": ({"key": torch.zeros(2, 2, 9, 16).half()}, "key: torch.float16"),
    "keys with steps": ({"key": torch.zeros(2, 2, 16, 9).transpose(2, 3)}, "key: its last dimension has stride 9"),
    "mask and causal": ({"mask": torch.ones(2, 1, 9, 9, dtype=torch.bool), "is_causal": True}, "mask: .* is_causal"),
    "a mask of two dimensions": ({"mask": torch.ones(9, 9, dtype=torch.bool)}, "mask: .* instead of"),
    "a mask of one row": ({"mask": torch.ones(2, 1, 1, 9, dtype=torch.bool)}, "mask: .* instead of"),
    "a position for each key": ({"positions": torch.arange(10)}, "positions: .* instead of int64"),
    "positions of int32": ({"positions": torch.arange(9, dtype=torch.int32)}, "positions: .*int32 instead of int64"),
    "no window": ({"window": 0}, "window: 0. Fix: let at least one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    changed, message = WRONG[name]
    query, key = Case().tensors()
    arguments = {"query": query, "key": key, "mask": None, "positions": None, "scale": 0.3, "is_causal": False}
    with pytest.raises(ValueError, match=message):
        torch.ops.avl.visual_scores(**{**arguments, "window": 1, **changed})
