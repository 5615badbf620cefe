"""`avl::attention`: the reference against float64, the lowerings against the reference."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from avl_fx.kernels.attention import LOWERINGS, attention_reference
from avl_fx.kernels.attention.fused import fused_attention
from avl_fx.passes.nodes import op
from tests.passes._graphs import rewrite

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.2e-2,
}
"""Largest error over largest value. Half precision: two roundings of the result and one of the probabilities."""

HALF = (torch.float16, torch.bfloat16)
HEADS = ((4, 4), (8, 2), (6, 1))
LENGTHS = ((1, 1), (1, 63), (63, 63), (5, 1000))


@dataclass(frozen=True)
class Case:
    """Sizes of one attention call."""

    heads: int = 4
    kv_heads: int = 2
    queries: int = 5
    keys: int = 7
    head_dim: int = 16
    value_dim: int = 16
    batch: int = 2
    dtype: torch.dtype = torch.float32

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value; keys differ enough for a wrong head or key to show."""
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        return (
            make(self.batch, self.heads, self.queries, self.head_dim),
            make(self.batch, self.kv_heads, self.keys, self.head_dim),
            make(self.batch, self.kv_heads, self.keys, self.value_dim),
        )

    def visible(self, shape: tuple[int, ...], seed: int = 1) -> Tensor:
        """A boolean mask in which every row sees key 0."""
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4
        mask[..., :1] = True
        return mask


def truth(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """Attention in float64, head by head and row by row, sharing no line with the reference."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    out = torch.zeros(batch, heads, queries, value.shape[-1], dtype=torch.float64)
    full = None if mask is None else mask.expand(batch, heads, queries, keys)
    for b, h in itertools.product(range(batch), range(heads)):
        shared = h * key.shape[1] // heads
        logits = scale * torch.einsum("id,jd->ij", query[b, h].double(), key[b, shared].double())
        for i in range(queries):
            row = logits[i]
            if is_causal:
                row = torch.where(torch.arange(keys) <= i, row, -torch.inf)
            if full is not None and full.dtype == torch.bool:
                row = torch.where(full[b, h, i], row, -torch.inf)
            elif full is not None:
                row = row + full[b, h, i].double()
            if row.max() == -torch.inf:
                continue
            weights = (row - row.max()).exp()
            out[b, h, i] = (weights / weights.sum()) @ value[b, shared].double()
    return out


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value; NaN counts as infinite."""
    difference = (actual.double() - expected.double()).abs().max().item()
    return float("inf") if difference != difference else difference / max(expected.double().abs().max().item(), 1e-30)


def check(case: Case, mask: Tensor | None = None, scale: float = 0.25, is_causal: bool = False) -> None:
    """Reference against float64, and every lowering against the reference."""
    query, key, value = case.tensors()
    expected = truth(query, key, value, mask, scale, is_causal)
    reference = attention_reference(query, key, value, mask, scale, is_causal)
    assert reference.dtype == case.dtype
    assert error(reference, expected) <= TOLERANCE[case.dtype]
    for device, lowering in LOWERINGS.items():
        out = lowering(query, key, value, mask, scale, is_causal)
        assert out.shape == reference.shape, device
        assert out.dtype == case.dtype, device
        assert error(out, reference) <= TOLERANCE[case.dtype], device


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_dtypes_and_groups(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    for queries in (1, 5):
        case = Case(heads, kv_heads, queries=queries, dtype=dtype)
        check(case)
        check(case, case.visible((2, 1, queries, 7)))
        check(case, torch.zeros(2, 1, queries, 7).masked_fill(~case.visible((2, 1, queries, 7)), -1e4).to(dtype))


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_awkward_lengths(queries: int, keys: int, dtype: torch.dtype) -> None:
    case = Case(4, 2, queries, keys, batch=1, dtype=dtype)
    check(case)
    check(case, is_causal=True)
    check(case, case.visible((1, 1, queries, keys)))


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (4, 6), (6, 4)])
def test_the_causal_flag_is_aligned_upper_left(heads: int, kv_heads: int, queries: int, keys: int) -> None:
    check(Case(heads, kv_heads, queries, keys), is_causal=True)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_masks_of_every_broadcast_shape(heads: int, kv_heads: int, boolean: bool, queries: int) -> None:
    case = Case(heads, kv_heads, queries=queries)
    full = (2, heads, queries, 7)
    shapes = {
        tuple(n if keep else 1 for n, keep in zip(full, flags, strict=True))
        for flags in itertools.product((0, 1), repeat=4)
    }
    shapes |= {full[i:] for i in range(5)}
    for shape in sorted(shapes):
        mask = case.visible(shape) if shape else torch.tensor(True)
        if not boolean:
            mask = torch.randn(shape, generator=torch.Generator().manual_seed(2)) - 5 * (~mask).float()
        check(case, mask)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_additive_masks_of_another_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    """Eager addition promotes; `scaled_dot_product_attention` does not."""
    for queries in (1, 5):
        case = Case(8, 2, queries=queries, dtype=dtype)
        hidden = ~case.visible((2, 1, queries, 7))
        check(case, torch.zeros(2, 1, queries, 7, dtype=mask_dtype).masked_fill(hidden, torch.finfo(mask_dtype).min))


@pytest.mark.parametrize("heads", [4, 6])
def test_a_prefix_that_sees_itself_both_ways(heads: int) -> None:
    """The mask of prefix language models, which no causal flag expresses."""
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    mask[:3, :3] = True
    check(Case(heads, 2, 7, 7), mask[None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_rows_without_a_visible_key(queries: int, dtype: torch.dtype) -> None:
    case = Case(8, 2, queries=queries, dtype=dtype)
    visible = case.visible((2, 8, queries, 7))
    visible[0, :, 0] = False
    visible[1, 3] = False
    minus_infinity = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)
    check(case, visible)
    check(case, minus_infinity)
    query, key, value = case.tensors()
    uniform = value.double().mean(dim=2).repeat_interleave(4, dim=1)
    for attend in (attention_reference, *LOWERINGS.values()):
        assert not attend(query, key, value, visible, 0.25, False)[0, :, 0].any(), "no visible key gives zeros"
        # The lowest finite mask absorbs the logits: all keys alike. That of float32 would be -inf in bfloat16.
        for lowest in (torch.finfo(dtype).min, torch.finfo(torch.float32).min):
            mask = torch.zeros(
                visible.shape, dtype=dtype if lowest != torch.finfo(torch.float32).min else torch.float32
            )
            rows = attend(query, key, value, mask.masked_fill(~visible, lowest), 0.25, False)[0, :, 0]
            assert error(rows, uniform[0]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("value_dim", [8, 24])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_values_of_another_dimension(heads: int, kv_heads: int, value_dim: int) -> None:
    for queries in (1, 5):
        case = Case(heads, kv_heads, queries, value_dim=value_dim)
        check(case)
        check(case, case.visible((2, 1, queries, 7)))
        check(case, is_causal=True)


class _Called(TorchDispatchMode):
    """Notes the names of ATen operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("value_dim", [8, 16])
def test_narrower_values_keep_the_fused_kernel(value_dim: int) -> None:
    """Where head dims differ SDPA takes its math path, and makes the whole attention matrix."""
    query, key, value = Case(8, 2, 5, 7, value_dim=value_dim).tensors()
    with _Called() as called:
        LOWERINGS["cpu"](query, key, value, None, 0.25, False)
    assert any("flash" in name for name in called.names)
    assert not any("softmax" in name for name in called.names)


@pytest.mark.parametrize("scale", [1.0, 0.0, 3.0, -0.25, 1e-4])
def test_scales(scale: float) -> None:
    check(Case(8, 2), scale=scale)
    check(Case(8, 2, queries=1), torch.randn(2, 8, 1, 7), scale=scale)


def test_operands_without_memory_layout() -> None:
    """Queries, keys and values as models have them: transposed, sliced and expanded."""
    query, key, value = Case(8, 2, 5, 7).tensors()
    inputs = (
        query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([key, key], dim=2)[:, :, :7],
        value[:1].expand(2, -1, -1, -1),
    )
    mask = torch.randn(1, 1, 5, 9)[..., :7].expand(2, 8, -1, -1)
    expected = truth(*inputs, mask, 0.25, False)
    for attend in (attention_reference, *LOWERINGS.values()):
        assert error(attend(*inputs, mask, 0.25, False), expected) <= TOLERANCE[torch.float32]


def test_dropped_keys_are_not_hidden() -> None:
    """NaN keys give NaN: they stand for keys that were never stored.

    (ATen's CPU kernel gives zeros when all of fewer than 16 keys, one vector, are NaN.)
    """
    query, key, value = Case(8, 2, keys=63).tensors()
    for attend in (attention_reference, *LOWERINGS.values()):
        assert attend(query, torch.full_like(key, torch.nan), value, None, 0.25, False).isnan().all()


@pytest.mark.parametrize("device", LOWERINGS)
@pytest.mark.parametrize("queries", [1, 5])
def test_gradients_flow_through_the_lowerings(device: str, queries: int) -> None:
    case = Case(8, 2, queries=queries, dtype=torch.float32)
    mask = torch.randn(2, 8, queries, 7, generator=torch.Generator().manual_seed(3))
    weight = torch.randn(2, 8, queries, 16, generator=torch.Generator().manual_seed(4))
    inputs = [t.requires_grad_() for t in case.tensors()]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    grads = torch.autograd.grad((LOWERINGS[device](*inputs, mask, 0.25, False) * weight).sum(), inputs)
    expected = torch.autograd.grad((attention_reference(*exact, mask, 0.25, False) * weight).sum(), exact)
    for grad, wanted in zip(grads, expected, strict=True):
        assert error(grad, wanted) <= 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(mask: str | None, dtype: torch.dtype) -> None:
    case = Case(8, 2, value_dim=24, dtype=dtype)
    given = {None: None, "bool": case.visible((2, 1, 5, 7)), "additive": torch.zeros(2, 8, 5, 7, dtype=dtype)}[mask]
    torch.library.opcheck(torch.ops.avl.attention.default, (*case.tensors(), given, 0.25, False, 0))


def test_fake_shapes_are_symbolic() -> None:
    """Batch, queries and keys may be symbolic; the result is shaped without a guard on any of them."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.ops.avl.attention(query, key, value, None, 0.25, False, 0)

    query, key, value = Case(8, 2, 5, 7, value_dim=24).tensors()
    for tensor, dims in ((query, (0, 2)), (key, (0, 2)), (value, (0, 2))):
        for dim in dims:
            torch._dynamo.mark_dynamic(tensor, dim)
    rewritten = rewrite(attend, query, key, value, stages=())
    node = next(n for n in rewritten.gm.graph.nodes if op(n) == "attention")
    batch, heads, queries, value_dim = node.meta["example_value"].shape
    assert (heads, value_dim) == (8, 24)
    assert not isinstance(batch, int)
    assert not isinstance(queries, int)
    assert rewritten.outputs[0].shape == (2, 8, 5, 24)


@pytest.mark.parametrize("value_dim", [8, 16])
def test_lowered_lengths_stay_symbolic(value_dim: int) -> None:
    """Dynamo raises where a dimension that is marked was fixed on the way."""
    query, key, value = Case(8, 2, 5, 7, value_dim=value_dim).tensors()
    for tensor in (query, key, value):
        torch._dynamo.mark_dynamic(tensor, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=0.25, enable_gqa=True)

    rewritten = rewrite(attend, query, key, value)
    assert rewritten.outputs[0].shape == (2, 8, 5, value_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", ["none", "causal", "bool", "additive"])
def test_as_one_operator_it_is_the_same(masked: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 7, 8, generator=generator).to(dtype) for n in (4, 2, 2))
    mask = None
    if masked in ("bool", "additive"):
        mask = torch.rand(2, 1, 7, 7, generator=generator) > 0.3
        mask = mask if masked == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    arguments = query, key, value, mask, 0.3, masked == "causal"
    found = fused_attention(*arguments)
    assert torch.equal(found, LOWERINGS["cpu"](*arguments))
    assert found.is_contiguous()
    torch.library.opcheck(torch.ops.avl.fused_attention.default, arguments)
