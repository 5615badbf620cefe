"""Decode steps that no other stage takes: which ones go to the kernel that reads each key once, and what they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avl_fx.passes import read_once as stage
from avl_fx.passes.site import Reason, Status
from avl_fx.plan import Plan
from tests._compiler import needs_compiler
from tests.passes._graphs import TOLERANCE, Rewritten, assert_same, check, counts, rewrite

HEADS, KV_HEADS, DIM, CAPACITY, PAST = 4, 2, 8, 24, 6

pytestmark = [needs_compiler, pytest.mark.usefixtures("short_caches_too")]


class Step(nn.Module):
    """One layer's attention over a static cache."""

    def __init__(self, style: str = "sdpa", is_causal: bool = False, sliding: bool = False, dropout: float = 0.0):
        super().__init__()
        self.style, self.causal_flag, self.dropout = style, is_causal, dropout
        self.layer_idx, self.is_causal, self.is_sliding = 0, True, sliding

    def store(self, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
        return cache.index_copy_(2, at, new)

    def forward(
        self, query: Tensor, new: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], mask: Tensor | None, at: Tensor
    ) -> Any:
        key, value = (self.store(c, n, at) for c, n in zip(cache, new, strict=True))
        key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
        if self.style == "softmax":
            logits = query @ key.transpose(2, 3) * 0.25
            out = torch.softmax(logits if mask is None else logits + mask, dim=-1) @ value
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=self.dropout, is_causal=self.causal_flag, scale=0.25
            )
        return out.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """Around a step: Dynamo then says which module attends, and the passes can ask it."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.self_attn = step

    def forward(self, *args: Any) -> Any:
        return self.self_attn(*args)


class Growing(Step):
    """Over a cache that grows by `cat`, and is returned."""

    def store(self, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
        return torch.cat([cache, new], 2)

    def forward(self, query: Tensor, new: Any, cache: Any, mask: Any, at: Tensor) -> Any:
        stored = [self.store(c, n, at) for c, n in zip(cache, new, strict=True)]
        out = F.scaled_dot_product_attention(query, *stored, attn_mask=mask, enable_gqa=True)
        return out, stored


class Uncached(Step):
    """Keys and values of this step alone."""

    def store(self, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
        return cache * 2


def arguments(
    queries: int = 1, mask: str = "bool", dtype: torch.dtype = torch.float32, capacity: int = CAPACITY
) -> list[Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(2, heads, length, DIM, generator=generator).to(dtype)

    at = torch.arange(PAST, PAST + queries)
    visible = (torch.arange(capacity) <= at[:, None]).expand(2, 1, queries, capacity).clone()
    visible[0, ..., :2] = False  # padding
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    masks = {"none": None, "bool": visible, "additive": bias}
    new = (draw(KV_HEADS, queries), draw(KV_HEADS, queries))
    return [draw(HEADS, queries), new, (draw(KV_HEADS, capacity), draw(KV_HEADS, capacity)), masks[mask], at]


def run(step: nn.Module, args: list[Any], **kwargs: Any) -> Rewritten:
    with torch.no_grad():
        return check(step, *args, **kwargs)


def taken(rewritten: Rewritten) -> bool:
    """Whether the stage took the only site; then nothing else of it is in the graph."""
    count = rewritten.result("read_once").count
    left = counts(rewritten.gm)
    assert left["partitioned_decode"] + left["scaled_dot_product_attention"] == 1
    assert count == left["partitioned_decode"]
    assert rewritten.new_guards == 0
    return bool(count)


@pytest.mark.parametrize("aot", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("dtype", [d for d in TOLERANCE if d != torch.float64], ids=str)
def test_a_step_on_a_static_cache_is_exact(dtype: torch.dtype, mask: str, aot: bool) -> None:
    rewritten = run(Step(), arguments(mask=mask, dtype=dtype), dtype=dtype, aot=aot)
    assert taken(rewritten)
    assert rewritten.site.status is Status.REWRITTEN
    assert rewritten.result("read_once").new_inputs == ()
    assert counts(rewritten.gm)["index_copy_"] == 2


def test_whatever_the_model_writes_attention_like() -> None:
    rewritten = run(Step("softmax"), arguments(mask="additive"), aot=True)
    assert taken(rewritten)
    assert not counts(rewritten.gm)["softmax"]


def test_rows_that_the_mask_hides_may_be_anything() -> None:
    args, broken = arguments(), arguments()
    for cache in broken[2]:
        cache[:, :, PAST + 1 :] = torch.nan  # nothing is stored there yet
        cache[0, :, :2] = torch.nan  # padding
    expected = Step()(*args)
    with torch.no_grad():
        rewritten = rewrite(Step(), *broken)
    assert taken(rewritten)
    assert_same(rewritten.outputs, [expected])


def test_nan_that_the_mask_shows_is_shown() -> None:
    args = arguments()
    args[2][0][:, :, 3] = torch.nan
    with torch.no_grad():
        rewritten = rewrite(Step(), *args)
    assert taken(rewritten)
    assert rewritten.outputs[0].isnan().all()


def test_symbolic_sizes() -> None:
    args = arguments()
    tensors = [args[0], *args[1], *args[2], args[3]]

    def flat(query: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return step(query, (k, v), (keys, values), mask, args[4])

    step = Step()
    marks = [(i, 0) for i in range(6)] + [(3, 2), (4, 2), (5, 3)]
    with torch.no_grad():
        rewritten = check(flat, *tensors, mark=marks)
    assert counts(rewritten.gm)["partitioned_decode"] == 1
    assert rewritten.new_guards == 0


def test_a_cache_that_is_copied() -> None:
    """It has no room for the row of this step, and will get some; meanwhile the copy is read once."""
    rewritten = run(Growing(), arguments(mask="none"))
    assert taken(rewritten)
    assert counts(rewritten.gm)["cat"] == 2
    assert rewritten.ctx.adopt


def test_a_sliding_window() -> None:
    """Nothing is reordered or left out, so its mask may mean what it likes."""
    rewritten = run(Layer(Step(sliding=True)), arguments())
    assert rewritten.site.kind == "sliding"
    assert taken(rewritten)


def test_what_a_plan_refuses_stays_refused() -> None:
    rewritten = run(Layer(Step(sliding=True)), arguments(), plan=Plan.avl(text=None))
    assert taken(rewritten)
    assert (rewritten.site.status, rewritten.site.reason) == (Status.REFUSED, Reason.POSITION_MASK)


# ---- what keeps ATen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "args"),
    [
        pytest.param(Step(), arguments(queries=2), id="a prompt"),
        pytest.param(Step(), arguments(dtype=torch.float64), id="float64"),
        pytest.param(Step(is_causal=True), arguments(mask="none"), id="a flag that shows the first key alone"),
        pytest.param(Layer(Uncached()), arguments(), id="no cache"),
    ],
)
def test_left_alone(step: nn.Module, args: list[Any]) -> None:
    assert not taken(run(step, args, dtype=args[0].dtype))


def test_dropout_is_refused_before() -> None:
    with torch.no_grad():
        rewritten = rewrite(Step(dropout=0.5), *arguments())
    assert rewritten.site.reason is Reason.DROPOUT
    assert rewritten.result("read_once").count == 0


@pytest.mark.parametrize("which", ["query", "key", "value", "mask"])
def test_gradients_need_an_operator_that_has_some(which: str) -> None:
    args = arguments(mask="additive")
    grown = Growing()
    args[2] = tuple(c[:, :, :PAST] for c in args[2])
    args[3] = args[3][..., : PAST + 1].clone()
    tensor = {"query": args[0], "key": args[1][0], "value": args[1][1], "mask": args[3]}[which]
    tensor.requires_grad_()
    rewritten = rewrite(grown, *args)
    assert not taken(rewritten)
    rewritten.outputs[0].sum().backward()
    assert tensor.grad is not None


def test_keys_with_steps_between_their_elements() -> None:
    """As a cache that is stored dimensions first has them."""
    args = arguments()
    args[2] = tuple(c.transpose(2, 3).contiguous().transpose(2, 3) for c in args[2])
    assert not taken(run(Step(), args))


def test_an_encoder_with_one_query() -> None:
    def pool(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    query, key, value = (torch.randn(2, 4, n, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 7, 7))
    assert not taken(run(pool, [query, key, value]))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "is_available", lambda: False)
    assert not taken(run(Step(), arguments()))


@pytest.mark.parametrize("threads", [1, 4, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short_caches(dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the work of a thread: 2 rows of 4 heads are for 8 threads at most."""
    products = 2 * HEADS * CAPACITY * DIM // min(threads, 2 * HEADS)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for least in (products, products + 1):
        monkeypatch.setattr(stage, "MIN_PRODUCTS", {dtype: least})
        assert taken(run(Step(), arguments(dtype=dtype), dtype=dtype)) == (least == products)


@pytest.mark.parametrize("dispatched", [True, False])
def test_calls_without_python_pay_sooner(dispatched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    products = 2 * HEADS * CAPACITY * DIM
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(stage, "MIN_PRODUCTS", {torch.float32: products + 1})
    monkeypatch.setattr(stage, "MIN_PRODUCTS_DISPATCHED", products)
    monkeypatch.setattr(stage, "is_dispatched", lambda: dispatched)
    assert taken(run(Step(), arguments())) == dispatched
