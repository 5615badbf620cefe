"""What must not become a canonical node is left exactly as the model wrote it, under a named reason.

Every case runs the whole pipeline and must still compute what eager computes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.site import Reason, Status
from tests.passes._graphs import Rewritten, capture, check, counts, find_node, rewrite
from tests.passes._negatives import CASES, Case, logits, qkv, with_mask

pytestmark = pytest.mark.filterwarnings("ignore:Implicit dimension choice for softmax")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_left_alone(case: Case) -> None:
    rewritten = check(
        case.function, *case.inputs(), dtype=torch.bfloat16 if case.reason is Reason.DTYPE else torch.float32
    )
    _assert_refused(rewritten, case.reason)


def _assert_refused(rewritten: Rewritten, reason: Reason | None) -> None:
    assert rewritten.result("find_attention").count == 0
    assert rewritten.result("lower").count == 0
    if reason is None:
        assert not rewritten.sites
        return
    assert {s.reason for s in rewritten.sites} == {reason}, [(s.reason, s.detail) for s in rewritten.sites]
    assert all(s.status is Status.REFUSED for s in rewritten.sites)
    assert rewritten.result("find_attention").refused == {str(reason): len(rewritten.sites)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_nothing_but_dead_code_is_touched(case: Case) -> None:
    """A refused site keeps every node that the model wrote."""
    before = counts(capture(case.function, *case.inputs()).gm)
    after = counts(rewrite(case.function, *case.inputs(), stages=(find_attention,)).gm)
    assert after == before


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["sdpa", "functional", "module"])
def test_active_dropout(style: str) -> None:
    drop = torch.nn.Dropout(0.4)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if style == "sdpa":
            return F.scaled_dot_product_attention(query, key, value, dropout_p=0.4)
        weights = torch.softmax(logits(query, key), dim=-1)
        return (drop(weights) if style == "module" else F.dropout(weights, p=0.4)) @ value

    inputs = qkv()
    torch.manual_seed(7)
    expected = attend(*inputs)
    torch.manual_seed(7)
    rewritten = rewrite(attend, *inputs)
    _assert_refused(rewritten, Reason.DROPOUT)
    # (Eager mode of the compiled graph draws the same random numbers.)
    torch.testing.assert_close(rewritten.outputs[0], expected)


def test_dropout_that_is_drawn_but_never_active() -> None:
    """p = 0 in training, and p > 0 in evaluation, do nothing."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = F.dropout(torch.softmax(logits(query, key), dim=-1), p=0.0, training=True)
        return F.dropout(weights, p=0.4, training=False) @ value

    assert check(attend, *qkv()).result("find_attention").count == 1


# ---- flex_attention --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_a_site_and_refused() -> None:
    def causal(score, batch, head, query, key):
        return torch.where(query >= key, score, -math.inf)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex_attention(query, key, value, score_mod=causal)

    rewritten = check(attend, *qkv())
    _assert_refused(rewritten, Reason.FLEX)
    assert rewritten.site.heads == 4


# ---- neighbours ------------------------------------------------------------------------------------------------------


def test_a_refused_site_does_not_stop_its_neighbours() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        first = F.scaled_dot_product_attention(query, key, value)
        weights = torch.softmax(logits(first, key), dim=-1)
        second = weights @ value
        return F.scaled_dot_product_attention(second, key, value), weights

    rewritten = check(attend, *qkv())
    assert rewritten.reasons == [None, Reason.WEIGHTS_USED, None]
    assert [s.index for s in rewritten.sites] == [0, 1, 2]


def test_a_mask_beside_the_causal_flag_is_refused() -> None:
    """Eager refuses the combination; a graph that holds it anyway must not lose the mask."""
    gm = capture(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), *with_mask()).gm
    node = find_node(gm, "scaled_dot_product_attention")
    node.kwargs = {**node.kwargs, "is_causal": True}
    rewritten = capture(lambda x: x + 1, torch.ones(2))
    find_attention(gm, rewritten.ctx)
    assert rewritten.site.reason is Reason.MASK
