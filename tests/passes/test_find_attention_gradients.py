"""Gradients go where the model sends them, or the site is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avl_fx.passes.site import Reason
from tests.passes._graphs import rewrite
from tests.passes._negatives import logits, qkv

HIDDEN = torch.ones(5, 5, dtype=torch.bool).triu(0)
"""The first row is hidden altogether, as those of left padding are."""


def weights_without(query, key, value):
    with torch.no_grad():
        weights = torch.softmax(logits(query, key), dim=-1)
    return weights @ value


def logits_without(query, key, value):
    with torch.no_grad():
        scores = logits(query, key)
    return torch.softmax(scores, dim=-1) @ value


def transposed_without(query, key, value):
    with torch.no_grad():
        columns = key.transpose(-1, -2)
    return torch.softmax(query @ columns, dim=-1) @ value


def repeated_without(query, key, value):
    with torch.no_grad():
        key = key[:, :2].repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(query, key, value)


def filled(query, key, value):
    return torch.softmax(logits(query, key).masked_fill(HIDDEN, torch.finfo(torch.float32).min), dim=-1) @ value


def whole(query, key, value):
    return torch.softmax(logits(query, key), dim=-1) @ value


def hidden(query, key, value):
    return torch.softmax(logits(query, key).masked_fill(HIDDEN.triu(1), float("-inf")), dim=-1) @ value


def prepared_without(query, key, value):
    """What has no gradient to lose: models compute RoPE so."""
    with torch.no_grad():
        turn = torch.arange(5.0)[:, None].cos()
    return F.scaled_dot_product_attention(query * turn, key * turn, value)


def scaled_without(query, key, value):
    """Upstream of what the site reads: keys that come in columns have no transpose to look through."""
    with torch.no_grad():
        scale = key.abs().mean()
    return torch.softmax(query @ (key.reshape(2, 4, 8, 5) / scale), dim=-1) @ value


def gradients(outputs: Any, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    weight = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad((outputs * weight).sum(), inputs, allow_unused=True))


REFUSED = (weights_without, logits_without, transposed_without, repeated_without, filled)


@pytest.mark.parametrize(
    "function", [*REFUSED, whole, hidden, prepared_without, scaled_without], ids=lambda f: f.__name__
)
def test_gradients_are_those_of_eager(function: Callable[..., Tensor]) -> None:
    inputs = tuple(x.requires_grad_() for x in qkv())
    rewritten = rewrite(function, *inputs, aot=True)
    expected = gradients(function(*inputs), inputs)
    for mine, theirs in zip(gradients(rewritten.outputs[0], inputs), expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert rewritten.reasons == [Reason.GRADIENT if function in REFUSED else None]


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_without_gradients_there_is_nothing_to_lose(function: Callable[..., Tensor]) -> None:
    assert rewrite(function, *qkv()).reasons == [None]
