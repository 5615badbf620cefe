"""Under autocast SDPA computes in another dtype than its operands have: the canonical node does so too, or nobody."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avl_fx.passes.nodes import op
from avl_fx.passes.site import Reason
from tests.passes._graphs import check
from tests.passes._negatives import logits, qkv

HALVES = (torch.bfloat16, torch.float16)
GIVEN = [given for half in HALVES for given in itertools.product((torch.float32, half), repeat=3)]


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("computed", HALVES)
@pytest.mark.parametrize("given", dict.fromkeys(GIVEN), ids=lambda g: "-".join(str(d)[6:] for d in g))
def test_computed_in_the_dtype_that_autocast_says(
    given: tuple[torch.dtype, ...], computed: torch.dtype, where: str
) -> None:
    """Whatever the operands are: rotary embeddings leave queries and keys in float32, projections values in half."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if where == "around":
            return F.scaled_dot_product_attention(query, key, value)
        with torch.autocast("cpu", computed):
            return F.scaled_dot_product_attention(query, key, value)

    operands = [x.to(dtype) for x, dtype in zip(qkv(), given, strict=True)]
    with torch.autocast("cpu", computed, enabled=where == "around"):
        rewritten = check(attend, *operands, dtype=computed)
    assert rewritten.outputs[0].dtype == computed
    assert rewritten.result("find_attention").count == 1
    assert rewritten.site.dtype == str(computed).removeprefix("torch.")


def test_repeated_keys_are_read_as_they_are() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))

    query, key, value = qkv(kv_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        rewritten = check(attend, query, key, value.bfloat16(), dtype=torch.bfloat16)
    assert rewritten.site.unrepeated
    assert not any(op(node) == "repeat_interleave" for node in rewritten.gm.graph.nodes)


def test_a_mask_stays_what_it_is() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    query, key, value = qkv()
    mask = torch.zeros(query.shape[2], key.shape[2])
    mask[:, 1] = torch.finfo(torch.float32).min
    with torch.autocast("cpu", torch.bfloat16):
        rewritten = check(attend, query, key, value, mask, dtype=torch.bfloat16)
    assert rewritten.site.mask == "additive"


def test_double_precision_is_none_of_its_business() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rewritten = check(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *(x.double() for x in qkv()), dtype=torch.float64
        )
    assert rewritten.site.dtype == "float64"


def test_keys_that_change_before_the_call_are_read_in_time() -> None:
    """The cast stands where the call stood: behind what was written before, and before what is written later."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key[:, :, 0] = 1.0
        first = F.scaled_dot_product_attention(query, key, value)
        key[:, :, 1] = 2.0
        return first, F.scaled_dot_product_attention(query, key, value)

    with torch.autocast("cpu", torch.bfloat16):
        assert check(attend, *qkv(), dtype=torch.bfloat16).result("find_attention").count == 2


def test_a_softmax_between_products_is_left_alone() -> None:
    """Each of its steps has a dtype of its own, and what the model asked for itself cannot be told from autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        rewritten = check(lambda q, k, v: torch.softmax(logits(q, k), dim=-1) @ v, *qkv(), dtype=torch.bfloat16)
    assert rewritten.reasons == [Reason.DTYPE]
