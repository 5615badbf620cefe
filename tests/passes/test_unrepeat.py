"""`repeat_kv` in every spelling leads back to the keys of the cache; what only resembles it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avl_fx.passes.find_attention import find_attention
from tests.passes._graphs import check, counts

Repeat = Callable[[Tensor], Tensor]

SEEN_THROUGH: dict[str, Repeat] = {
    "expand, reshape": lambda x: x[:, :, None, :, :].expand(2, 2, 3, 5, 8).reshape(2, 6, 5, 8),
    "expand, reshape, short index": lambda x: x[:, :, None].expand(2, 2, 3, 5, 8).reshape(2, 6, 5, 8),
    "unsqueeze, expand, reshape": lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1).reshape(2, 6, 5, 8),
    "unsqueeze from the end": lambda x: x.unsqueeze(-3).expand(-1, -1, 3, -1, -1).reshape(2, 6, 5, 8),
    "expand, contiguous, view": lambda x: x[:, :, None].expand(2, 2, 3, 5, 8).contiguous().view(2, 6, 5, 8),
    "repeat, view": lambda x: x.unsqueeze(2).repeat(1, 1, 3, 1, 1).view(2, 6, 5, 8),
    "expand, flatten": lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, 3, dim=1),
    "repeat_interleave from the end": lambda x: x.repeat_interleave(3, -3),
    "then contiguous": lambda x: x.repeat_interleave(3, 1).contiguous(),
    "then a slice of the keys": lambda x: x.repeat_interleave(3, 1)[:, :, :4],
    "then a slice and contiguous": lambda x: x.repeat_interleave(3, 1)[:, :, 1:4, :].contiguous(),
    "after a slice": lambda x: x[:, :, :4].repeat_interleave(3, 1),
}

LOOKALIKES: dict[str, Repeat] = {
    "tiled instead of interleaved": lambda x: x.repeat(1, 3, 1, 1),
    "tiled by expand": lambda x: x[:, None].expand(2, 3, 2, 5, 8).reshape(2, 6, 5, 8),
    "tiled by cat": lambda x: torch.cat([x, x, x], dim=1),
    "scaled on the way": lambda x: (x[:, :, None] * torch.ones(1, 1, 3, 1, 1)).reshape(2, 6, 5, 8),
    "only some heads": lambda x: x.repeat_interleave(3, 1)[:, [0, 1, 2, 3, 5, 4]],
    "heads reversed": lambda x: x.repeat_interleave(3, 1).flip(1),
    "unequal repeats": lambda x: torch.repeat_interleave(x, torch.tensor([4, 2]), dim=1, output_size=6),
    "keys mixed into heads": lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1).reshape(2, 5, 6, 8).transpose(1, 2),
    "keys picked": lambda x: x.repeat_interleave(3, 1)[:, :, torch.tensor([0, 2, 1, 3, 4])],
}


def attend_with(repeat_key: Repeat, repeat_value: Repeat) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, repeat_key(key), repeat_value(value))

    return attend


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 5, 8, generator=generator) for h in (6, 2, 2))
    return query, key, value


@pytest.mark.parametrize("how", SEEN_THROUGH)
def test_repeats_are_seen_through(how: str) -> None:
    rewritten = check(attend_with(SEEN_THROUGH[how], SEEN_THROUGH[how]), *tensors(), stages=(find_attention,))
    assert (rewritten.site.heads, rewritten.site.kv_heads) == (6, 2)
    assert rewritten.site.unrepeated
    left = counts(rewritten.gm)
    assert not left["expand"] + left["repeat"] + left["repeat_interleave"] + left["reshape"]


@pytest.mark.parametrize("how", LOOKALIKES)
def test_what_only_resembles_a_repeat_stays(how: str) -> None:
    """The site is canonical with as many key heads as query heads, and right."""
    rewritten = check(attend_with(LOOKALIKES[how], LOOKALIKES[how]), *tensors(), stages=(find_attention,))
    assert rewritten.site.reason is None
    assert (rewritten.site.heads, rewritten.site.kv_heads) == (6, 6)
    assert not rewritten.site.unrepeated


@pytest.mark.parametrize(
    "tile",
    [
        lambda x: x[:, None].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8),
        lambda x: x.unsqueeze(1).expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8),
        lambda x: x.unsqueeze(1).repeat(1, 2, 1, 1, 1).flatten(1, 2),
    ],
)
def test_tiles_of_as_many_groups_as_heads_stay(tile: Repeat) -> None:
    """Every size agrees with a repeat; only the order of the heads does not."""
    query, key, value = tensors()
    rewritten = check(attend_with(tile, tile), query[:, :4], key, value, stages=(find_attention,))
    assert rewritten.site.kv_heads == 4


def test_keys_repeated_along_the_sequence_stay() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(3, dim=2) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    query, key, value = tensors()
    rewritten = check(attend, query[:, :2], key, value, torch.randn(2, 1, 5, 15), stages=(find_attention,))
    assert (rewritten.site.kv_heads, rewritten.site.keys) == (2, 15)


def test_keys_and_values_may_be_repeated_in_different_spellings() -> None:
    mixed = attend_with(SEEN_THROUGH["expand, reshape"], SEEN_THROUGH["repeat_interleave"])
    assert check(mixed, *tensors(), stages=(find_attention,)).site.kv_heads == 2


@pytest.mark.parametrize("other", ["tiled instead of interleaved", "tiled by cat"])
def test_keys_alone_are_not_unrepeated(other: str) -> None:
    """Keys and values must have the same number of heads."""
    for pair in (
        (SEEN_THROUGH["repeat_interleave"], LOOKALIKES[other]),
        (LOOKALIKES[other], SEEN_THROUGH["repeat_interleave"]),
    ):
        rewritten = check(attend_with(*pair), *tensors(), stages=(find_attention,))
        assert rewritten.site.reason is None
        assert rewritten.site.kv_heads == 6
        assert not rewritten.site.unrepeated


def test_one_key_head_by_broadcasting() -> None:
    """Multi-query attention without any repeat: the products broadcast."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key[:, :1].transpose(2, 3), dim=-1) @ value[:, :1]

    rewritten = check(attend, *tensors())
    assert rewritten.site.reason is None
    assert (rewritten.site.heads, rewritten.site.kv_heads) == (6, 1)


def test_a_repeat_below_enable_gqa() -> None:
    """Two key heads made four, and those shared by twelve query heads."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query.repeat(1, 2, 1, 1), key, value, enable_gqa=True)

    rewritten = check(attend, *tensors())
    assert (rewritten.site.heads, rewritten.site.kv_heads) == (12, 2)
