"""Attention in operators of other libraries: FlashAttention's becomes canonical, what nobody knows is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.site import Reason, Status
from tests._flash_attention import flash_attn_func
from tests.passes._graphs import capture, check, counts, rewrite


def operands(batch: int = 2, heads: int = 4, kv_heads: int = 2, queries: int = 5, keys: int = 5, dim: int = 8) -> Any:
    """Query, key and value as FlashAttention takes them."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(batch, n, h, dim, generator=generator) for n, h in shapes]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.sampled_from((1, 2, 3)),
    groups=st.sampled_from((1, 2, 4)),
    queries=st.integers(1, 6),
    more=st.integers(0, 4),
    scale=st.sampled_from((None, 0.3)),
    flags=st.sampled_from(({}, {"causal": True}, {"window_size": (-1, 0)})),
)
def test_it_means_what_it_replaced(batch, kv_heads, groups, queries, more, scale, flags) -> None:
    """SDPA takes causal queries for the first of the keys, FlashAttention for the last ones: those are left alone."""
    rewritten = check(
        lambda q, k, v: flash_attn_func(q, k, v, scale, **flags),
        *operands(batch, kv_heads * groups, kv_heads, queries, queries + more),
    )
    site = rewritten.site
    assert site.style == "library"
    assert (site.heads, site.kv_heads, site.queries, site.keys) == (
        kv_heads * groups,
        kv_heads,
        queries,
        queries + more,
    )
    if flags and more and queries > 1:
        assert (site.status, site.reason) == (Status.REFUSED, Reason.MASK)
    else:
        assert site.reason is None
        assert rewritten.result("find_attention").count == 1
        assert "_flash_attn_forward" not in counts(rewritten.gm)


def test_open_sizes() -> None:
    def attend(x: Tensor) -> Any:
        return flash_attn_func(x, x[:, :, :2], x[:, :, 2:], causal=True)

    rewritten = check(attend, torch.randn(2, 5, 4, 8), mark=[(0, 0), (0, 1)])
    assert rewritten.site.reason is None
    assert isinstance(rewritten.site.queries, str)
    apart = check(lambda q, k, v: flash_attn_func(q, k, v, causal=True), *operands(), mark=[(0, 1)])
    assert apart.reasons == [Reason.MASK]  # as many queries as keys for all that is known is none


def test_a_cache_turned_for_the_call_is_read_as_it_lies() -> None:
    """Transformers keep heads before tokens and turn all three around the call."""

    def attend(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.cat((past, k), 2)
        turned = (x.transpose(1, 2) for x in (q, keys, keys + v[:, :, :1]))
        return flash_attn_func(*turned, causal=True).transpose(1, 2), keys

    q, k, v = (x.transpose(1, 2).contiguous() for x in operands(queries=1, keys=1))
    rewritten = rewrite(attend, q, k, v, torch.randn(2, 2, 7, 8), stages=(find_attention,))
    (canonical,) = rewritten.canonical
    assert [n.name for n in canonical.args[:2]] == ["l_q_", "keys"]
    assert (rewritten.site.cache, rewritten.site.keys) == ("dynamic", 8)
    check(attend, q, k, v, torch.randn(2, 2, 7, 8))


def test_operands_that_were_permuted_are_turned_once_more() -> None:
    """Only what swaps heads and tokens, and nothing else, is looked through."""

    def attend(x: Tensor) -> Any:
        q, k, v = x.permute(1, 0, 2, 3, 4)
        return flash_attn_func(q, k.transpose(1, 3).transpose(1, 3), v.permute(0, 1, 2, 3), causal=True)

    assert check(attend, torch.randn(2, 3, 5, 4, 8)).site.reason is None


REFUSED = {
    "softcap": ({"softcap": 5.0}, Reason.SOFTCAP),
    "alibi": ({"alibi_slopes": torch.full((4,), 0.1)}, Reason.MASK),
    "window": ({"window_size": (2, 2)}, Reason.MASK),
    "look_ahead": ({"window_size": (-1, 1)}, Reason.MASK),
    "sliding": ({"window_size": (2, 0), "causal": True}, Reason.MASK),
    "log_sum_exp": ({"return_lse": True}, Reason.WEIGHTS_USED),
}


@pytest.mark.parametrize("case", REFUSED)
def test_left_alone(case: str) -> None:
    flags, reason = REFUSED[case]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attn_func(q, k, v, **flags)

    rewritten = check(attend, *operands())
    assert rewritten.reasons == [reason]
    before, after = (
        counts(graph.gm)
        for graph in (capture(attend, *operands()), rewrite(attend, *operands(), stages=(find_attention,)))
    )
    assert after == before


def test_what_sdpa_would_not_take_is_not_given_to_it() -> None:
    q, k, v = operands()
    mixed = check(lambda q, k, v: flash_attn_func(q, k, v.double()), q, k, v)
    assert mixed.reasons == [Reason.DTYPE]


def test_where_nothing_lowers_it_the_call_is_as_it_was(monkeypatch) -> None:
    monkeypatch.setattr("avl_fx.passes.find_attention.LOWERINGS", {})
    rewritten = check(lambda q, k, v: flash_attn_func(q, k, v), *operands())
    assert rewritten.reasons == [Reason.DEVICE]
    assert rewritten.site.node.name == "_flash_attn_forward"
    assert not {"scaled_dot_product_attention", "transpose"} & set(counts(rewritten.gm))


@torch.library.custom_op("avl_fx_tests::somebodys_attention", mutates_args=())
def somebodys_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What another library might bring."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


@somebodys_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


def test_an_operator_that_nobody_knows_is_a_site_and_refused() -> None:
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    rewritten = check(lambda q, k, v: somebodys_attention(q, k, v) + 1, q, k, v)
    assert rewritten.reasons == [Reason.LIBRARY]
    assert rewritten.site.detail == "avl_fx_tests::somebodys_attention"


def test_a_fused_kernel_of_pytorch_that_is_called_by_its_name() -> None:
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rewritten = check(lambda q, k, v: fused(q, k, v)[0], q, k, v)
    assert rewritten.reasons == [Reason.LIBRARY]
