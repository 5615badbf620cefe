"""Canonical nodes become operators that Inductor knows, with the layouts that the model relies on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avl_fx.kernels.attention import LOWERINGS
from avl_fx.passes.site import Reason, Status
from tests.passes._graphs import check, counts, rewrite

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(8, 5, 8),
    "view of a transpose": lambda x: x.transpose(2, 3).view(8, 8, 5),
    "view of a permutation": lambda x: x.permute(0, 1, 3, 2).view(2, 32, 5),
    "view of a product": lambda x: (x * 2).view(8, 5, 8),
    "view of a sum": lambda x: (1 + x).view(8, 40),
    "view of a sum of transposes": lambda x: (x.transpose(2, 3) + 1).view(8, 8, 5),
    "view of a cast": lambda x: x.to(torch.float32).view(8, 40),
    "strides": lambda x: x.as_strided((2, 160), (160, 1)),
    "returned": lambda x: x,
    "unflatten": lambda x: x.unflatten(2, (5, 1)),
    "reshape": lambda x: x.transpose(1, 2).reshape(2, 5, 32),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().view(2, 5, 32),
    "flatten": lambda x: x.transpose(1, 2).flatten(2),
    "linear": lambda x: F.linear(x, torch.ones(3, 8)),
}


def tensors(kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """As projections make them: ``[batch, sequence, heads, dim]`` in memory."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 5, h, 8, generator=generator).transpose(1, 2) for h in (4, kv_heads, kv_heads))
    return query, key, value


def attention(style: str, layout: str) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if style == "softmax":
            out = torch.softmax(query @ key.transpose(2, 3), dim=-1) @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        return LAYOUTS[layout](out)

    return attend


def runs_in_eager(style: str, layout: str) -> bool:
    """Not every view suits what `scaled_dot_product_attention` returns."""
    try:
        attention(style, layout)(*tensors())
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    ("style", "layout"),
    [(style, layout) for style in ("softmax", "sdpa") for layout in LAYOUTS if runs_in_eager(style, layout)],
)
def test_the_model_gets_the_layout_that_it_had(style: str, layout: str) -> None:
    """Traced as Inductor traces it, where a view of the wrong strides raises."""
    attend = attention(style, layout)
    rewritten = check(attend, *tensors(), aot=True)
    assert rewritten.site.status is Status.REWRITTEN
    eager = attend(*tensors())
    if style == "softmax":
        assert rewritten.outputs[0].is_contiguous() == eager.is_contiguous()


def test_no_copy_where_the_layout_does_not_matter() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.softmax(query @ key.transpose(2, 3), dim=-1) @ value
        return out.transpose(1, 2).reshape(2, 5, 32)

    assert not counts(check(attend, *tensors()).gm)["contiguous"]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_keys_stay_grouped_on_cpu(kv_heads: int) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value)

    rewritten = check(attend, *tensors(kv_heads))
    node = rewritten.site.node
    assert node is not None
    assert node.target is not torch.ops.avl.attention.default
    assert node.kwargs["enable_gqa"] == (kv_heads != 4)
    assert not counts(rewritten.gm)["repeat_interleave"]


def test_a_device_without_a_lowering_keeps_what_the_model_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LOWERINGS, "cpu")
    rewritten = check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *tensors())
    assert rewritten.site.reason is Reason.DEVICE
    assert rewritten.site.status is Status.REFUSED
    assert counts(rewritten.gm)["scaled_dot_product_attention"] == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [1, 5])
def test_the_cuda_lowering_inlines(monkeypatch: pytest.MonkeyPatch, masked: bool, queries: int) -> None:
    """It is plain PyTorch: what it makes of a graph can be held against eager anywhere."""
    monkeypatch.setitem(LOWERINGS, "cpu", LOWERINGS["cuda"])

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    query, key, value = tensors(2)
    mask = torch.randn(2, 4, queries, 5) if masked else None
    for dynamic in (None, True):
        # Symbolic head counts are refused: the projection's weights fix them in a model.
        marks = [(i, 2) for i in (1, 2)] if dynamic else []
        rewritten = check(attend, query[:, :, :queries], key, value, mask, aot=True, mark=marks)
        assert rewritten.site.status is Status.REWRITTEN


def test_gradients_reach_queries_keys_and_values() -> None:
    """A rewritten model can still be trained: lowerings are ordinary operators."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.softmax(query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3, dim=-1)
        return (weights @ value.repeat_interleave(2, 1)).square().sum()

    eager = [t.detach().requires_grad_() for t in tensors(2)]
    attend(*eager).backward()
    mine = [t.detach().requires_grad_() for t in tensors(2)]
    rewritten = rewrite(attend, *mine, aot=True)
    rewritten.outputs[0].backward()
    assert rewritten.site.status is Status.REWRITTEN
    for got, wanted in zip(mine, eager, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-4, rtol=1e-4)
