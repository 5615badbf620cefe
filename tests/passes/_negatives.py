"""Functions that resemble attention and must not become a canonical node, each with the name of its refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avl_fx.passes.site import Reason

__all__ = ["CASES", "Case", "logits", "qkv", "with_mask"]


def qkv(
    *, heads: int = 4, kv_heads: int = 4, queries: int = 5, keys: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, queries, 8, generator=generator)
    key, value = (torch.randn(2, kv_heads, keys, 8, generator=generator) for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def logits(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.transpose(-1, -2) * 0.35


@dataclass(frozen=True)
class Case:
    """A function of query, key and value that only resembles attention."""

    name: str
    function: Callable[..., Any]
    reason: Reason | None
    """``None``: no site at all."""
    inputs: Callable[[], tuple[Any, ...]] = qkv


CASES: list[Case] = []


def case(
    reason: Reason | None, inputs: Callable[[], tuple[Any, ...]] = qkv
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(Case(function.__name__, function, reason, inputs))
        return function

    return add


# ---- the weights are needed ------------------------------------------------------------------------------------------


@case(Reason.WEIGHTS_USED)
def weights_returned(query, key, value):
    weights = torch.softmax(logits(query, key), dim=-1)
    return weights @ value, weights


@case(Reason.WEIGHTS_USED)
def weights_returned_after_idle_dropout(query, key, value):
    weights = F.dropout(torch.softmax(logits(query, key), dim=-1), p=0.0, training=False)
    return weights @ value, weights


@case(Reason.WEIGHTS_USED)
def weights_returned_before_idle_dropout(query, key, value):
    weights = torch.softmax(logits(query, key), dim=-1)
    return F.dropout(weights, p=0.0, training=False) @ value, weights


@case(Reason.WEIGHTS_USED)
def weights_multiplied_twice(query, key, value):
    weights = torch.softmax(logits(query, key), dim=-1)
    return weights @ value + weights @ value.flip(2)


@case(Reason.WEIGHTS_USED)
def weights_summed_for_a_score(query, key, value):
    weights = torch.softmax(logits(query, key), dim=-1)
    return weights @ value, weights[:, :, -1].mean(1)


@case(Reason.WEIGHTS_USED)
def weights_overwritten_in_place(query, key, value):
    weights = torch.softmax(logits(query, key), dim=-1)
    weights[..., 0] = 0.0
    return weights @ value


@case(Reason.WEIGHTS_USED)
def logits_returned(query, key, value):
    scores = query @ key.transpose(-1, -2)
    return torch.softmax(scores * 0.35, dim=-1) @ value, scores


@case(Reason.WEIGHTS_USED)
def scaled_logits_returned(query, key, value):
    scores = logits(query, key)
    return torch.softmax(scores, dim=-1) @ value, scores


@case(Reason.WEIGHTS_USED)
def logits_written_behind_the_back(query, key, value):
    scores = query @ key.transpose(-1, -2)
    scores.mul_(0.35)
    return torch.softmax(scores, dim=-1) @ value


@case(Reason.WEIGHTS_USED)
def a_second_softmax_over_the_same_logits(query, key, value):
    scores = logits(query, key)
    return torch.softmax(scores, dim=-1) @ value + torch.softmax(scores, dim=-1) @ value


# ---- the logits are something else -----------------------------------------------------------------------------------


@case(Reason.SOFTCAP)
def soft_capped_logits(query, key, value):
    scores = torch.tanh(logits(query, key) / 5.0) * 5.0
    return torch.softmax(scores, dim=-1) @ value


@case(Reason.SOFTCAP)
def soft_capped_logits_with_a_mask(query, key, value):
    scores = torch.tanh(logits(query, key) / 5.0) * 5.0
    return torch.softmax(scores + torch.zeros(5, 5).masked_fill(~torch.ones(5, 5).tril().bool(), -1e30), dim=-1) @ value


@case(Reason.LOGITS)
def logits_clamped(query, key, value):
    return torch.softmax(logits(query, key).clamp(max=1.0), dim=-1) @ value


@case(Reason.LOGITS)
def logits_normalised(query, key, value):
    scores = logits(query, key)
    return torch.softmax(scores.relu(), dim=-1) @ value


@case(Reason.LOGITS)
def logits_shifted_by_a_maximum(query, key, value):
    scores = query @ key.transpose(-1, -2)
    return torch.softmax(torch.sub(scores, 1.0, alpha=2), dim=-1) @ value


@case(Reason.LOGITS)
def logits_less_twice_their_maximum(query, key, value):
    """The same to a softmax, but what is taken off has the logits in it a second time."""
    scores = logits(query, key)
    return torch.softmax(torch.sub(scores, scores.amax(-1, keepdim=True), alpha=2), dim=-1) @ value


@case(Reason.LOGITS)
def logits_less_the_maximum_over_queries(query, key, value):
    scores = logits(query, key)
    return torch.softmax(scores - scores.amax(-2, keepdim=True), dim=-1) @ value


@case(Reason.LOGITS)
def maximum_of_the_logits_returned(query, key, value):
    scores = logits(query, key)
    maximum = scores.max(-1, keepdim=True).values
    return torch.softmax(scores - maximum, dim=-1) @ value, maximum


@case(Reason.LOGITS)
def place_of_the_maximum_returned(query, key, value):
    scores = logits(query, key)
    maximum, place = scores.max(-1, keepdim=True)
    return torch.softmax(scores - maximum, dim=-1) @ value, place


@case(Reason.LOGITS)
def maximum_less_the_logits(query, key, value):
    scores = logits(query, key)
    return torch.softmax(scores.amax(-1, keepdim=True) - scores, dim=-1) @ value


@case(Reason.LOGITS)
def logits_less_the_maximum_of_others(query, key, value):
    return torch.softmax(logits(query, key) - query.amax(-1, keepdim=True), dim=-1) @ value


@case(Reason.LOGITS)
def logits_rounded(query, key, value):
    scores = query @ key.transpose(-1, -2)
    return torch.softmax(torch.div(scores, 0.5, rounding_mode="floor"), dim=-1) @ value


@case(Reason.LOGITS)
def logits_quantised(query, key, value):
    scores = logits(query, key) * 4
    return torch.softmax(scores.to(torch.int32).float() / 4, dim=-1) @ value


@case(Reason.LOGITS, lambda: (*qkv(), torch.full((4, 1, 1), 0.3)))
def scale_is_a_tensor(query, key, value, temperature):
    return torch.softmax(query @ key.transpose(-1, -2) * temperature, dim=-1) @ value


@case(Reason.LOGITS)
def scale_divides_a_number(query, key, value):
    return torch.softmax(2.0 / (logits(query, key) + 30.0), dim=-1) @ value


@case(Reason.LOGITS)
def logits_of_two_products(query, key, value):
    return torch.softmax(query @ key.transpose(-1, -2) + key @ query.transpose(-1, -2), dim=-1) @ value


@case(Reason.LOGITS)
def logits_of_no_product(query, key, value):
    return torch.softmax(query[..., :5] - key[..., :5], dim=-1) @ value


@case(Reason.LOGITS)
def logits_by_einsum(query, key, value):
    return torch.softmax(torch.einsum("bhqd,bhkd->bhqk", query, key), dim=-1) @ value


# ---- masks that cannot be carried ------------------------------------------------------------------------------------


def with_mask() -> tuple[Tensor, ...]:
    return *qkv(), torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(1))


@case(Reason.MASK, with_mask)
def mask_scaled_with_the_logits(query, key, value, mask):
    return torch.softmax((query @ key.transpose(-1, -2) + mask) * 0.35, dim=-1) @ value


@case(Reason.MASK, with_mask)
def mask_divided_with_the_logits(query, key, value, mask):
    return torch.softmax((query @ key.transpose(-1, -2) + mask).float() / 3.0, dim=-1) @ value


@case(Reason.MASK, with_mask)
def filled_mask_scaled_with_the_logits(query, key, value, mask):
    return torch.softmax((query @ key.transpose(-1, -2)).masked_fill(mask > 0, -1e38) * 0.001, dim=-1) @ value


@case(Reason.LOGITS, with_mask)
def two_masks_added(query, key, value, mask):
    return torch.softmax(logits(query, key) + mask + mask.flip(-1), dim=-1) @ value


@case(Reason.MASK, with_mask)
def a_mask_added_and_one_filled(query, key, value, mask):
    scores = (logits(query, key) + mask).masked_fill(mask > 1, float("-inf"))
    return torch.softmax(scores, dim=-1) @ value


@case(Reason.MASK, with_mask)
def two_masks_filled(query, key, value, mask):
    scores = logits(query, key).masked_fill(mask > 1, float("-inf")).masked_fill(mask < -1, float("-inf"))
    return torch.softmax(scores, dim=-1) @ value


@case(Reason.MASK, with_mask)
def mask_added_twice_over(query, key, value, mask):
    return torch.softmax(torch.add(logits(query, key), mask, alpha=2), dim=-1) @ value


@case(Reason.MASK)
def a_number_added(query, key, value):
    return torch.softmax(logits(query, key) + 1.0, dim=-1) @ value


@case(Reason.MASK, with_mask)
def filled_with_a_small_number(query, key, value, mask):
    return torch.softmax(logits(query, key).masked_fill(mask > 0, -2.0), dim=-1) @ value


@case(Reason.MASK, with_mask)
def filled_with_zero(query, key, value, mask):
    return torch.softmax(torch.where(mask > 0, logits(query, key), 0.0), dim=-1) @ value


@case(Reason.MASK, with_mask)
def filled_with_a_tensor(query, key, value, mask):
    return torch.softmax(torch.where(mask > 0, logits(query, key), mask), dim=-1) @ value


@case(Reason.MASK, lambda: (*qkv(queries=1), torch.randn(2, 1, 5, 5)))
def mask_broadcasts_the_logits(query, key, value, mask):
    return torch.softmax(logits(query, key) + mask, dim=-1) @ value


@case(Reason.MASK, lambda: (*qkv(), torch.randint(0, 3, (2, 1, 5, 5))))
def mask_of_integers(query, key, value, mask):
    return torch.softmax(logits(query, key) + mask, dim=-1) @ value


# ---- some weights are cut off ----------------------------------------------------------------------------------------


@case(Reason.SINKS, lambda: (*qkv(), torch.full((4,), 0.3)))
def sinks(query, key, value, sinks):
    scores = logits(query, key)
    column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1] @ value


@case(Reason.SINKS, lambda: (*qkv(), torch.full((4,), 0.3)))
def sinks_less_the_maximum(query, key, value, sinks):
    """With casts and idle dropout, as GPT-OSS writes it."""
    scores = torch.cat([logits(query, key), sinks.reshape(1, -1, 1, 1).expand(*query.shape[:-1], 1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    weights = F.softmax(scores, dim=-1, dtype=torch.float32)[..., :-1]
    return F.dropout(weights, 0.0, False).to(value.dtype) @ value


@case(Reason.SINKS)
def weights_narrowed(query, key, value):
    return torch.softmax(logits(query, key), dim=-1).narrow(-1, 0, 3) @ value[:, :, :3]


@case(None)
def one_query_of_a_softmax(query, key, value):
    """What is cut off are queries, not keys."""
    return torch.softmax(logits(query, key), dim=-1)[:, :, -1:] @ value


# ---- the softmax is something else -----------------------------------------------------------------------------------


@case(Reason.SOFTMAX_DIM)
def softmax_over_the_queries(query, key, value):
    return torch.softmax(logits(query, key), dim=-2) @ value


@case(Reason.SOFTMAX_DIM)
def softmax_over_what_torch_guesses(query, key, value):
    """Of four dimensions the second."""
    return F.softmax(logits(query, key)) @ value


@case(Reason.SOFTMAX_DIM)
def softmax_over_the_heads(query, key, value):
    return torch.softmax(logits(query, key), dim=1) @ value


@case(None)
def router(query, key, value):
    """Mixture of experts: softmax over experts, then top-k."""
    return torch.topk(torch.softmax(query.flatten(2) @ value.flatten(2).transpose(1, 2), dim=-1), 2).values


@case(None)
def router_of_rank_four(query, key, value):
    weights, chosen = torch.topk(torch.softmax(logits(query, key), dim=-1), 2)
    return weights / weights.sum(-1, keepdim=True), chosen


@case(None)
def classifier_head(query, key, value):
    return torch.softmax(query.mean(2) @ value[0, 0].transpose(0, 1), dim=-1)


@case(None)
def softmax_as_right_operand(query, key, value):
    return value.transpose(-1, -2) @ torch.softmax(logits(query, key), dim=-1)


@case(None)
def weights_scaled_per_head(query, key, value):
    return (torch.softmax(logits(query, key), dim=-1) * torch.arange(4.0).view(1, 4, 1, 1)) @ value


@case(None)
def rank_three_by_bmm(query, key, value):
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    return torch.bmm(torch.softmax(torch.bmm(query, key.transpose(1, 2)), dim=-1), value)


@case(None)
def result_unused(query, key, value):
    F.scaled_dot_product_attention(query, key, value)
    return query + value


# ---- shapes and dtypes -----------------------------------------------------------------------------------------------


@case(Reason.RANK)
def rank_three_sdpa(query, key, value):
    return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (query, key, value)))


@case(Reason.RANK)
def rank_five_sdpa(query, key, value):
    return F.scaled_dot_product_attention(*(x.unflatten(1, (2, 2)) for x in (query, key, value)))


@case(Reason.BROADCAST)
def keys_broadcast_over_the_batch(query, key, value):
    return F.scaled_dot_product_attention(query, key[:1], value[:1])


@case(Reason.BROADCAST)
def one_query_for_the_batch(query, key, value):
    return torch.softmax(logits(query[:1], key), dim=-1) @ value


@case(Reason.HEADS)
def values_of_one_head(query, key, value):
    return torch.softmax(logits(query, key), dim=-1) @ value[:, :1]


@case(Reason.DTYPE)
def values_of_another_dtype(query, key, value):
    return torch.softmax(logits(query, key), dim=-1).to(torch.bfloat16) @ value.to(torch.bfloat16)


@case(Reason.DTYPE)
def keys_of_another_dtype(query, key, value):
    scores = (query @ key.transpose(-1, -2)).to(torch.float64)
    return torch.softmax(scores, dim=-1) @ value.double()


@case(Reason.DTYPE)
def autocast_changes_the_dtype(query, key, value):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.softmax(logits(query, key), dim=-1) @ value


# ---- operands that change underway -----------------------------------------------------------------------------------


@case(Reason.MUTATION)
def keys_written_between_product_and_values(query, key, value):
    scores = logits(query, key)
    key.index_copy_(2, torch.tensor([0]), torch.zeros(2, 4, 1, 8))
    return torch.softmax(scores, dim=-1) @ value


@case(Reason.MUTATION, with_mask)
def mask_written_between_product_and_values(query, key, value, mask):
    weights = torch.softmax(logits(query, key) + mask, dim=-1)
    mask.zero_()
    return weights @ value


@case(Reason.MUTATION, lambda: qkv(kv_heads=2))
def keys_written_after_they_were_repeated(query, key, value):
    full_key, full_value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    key[:, :, 0] = 0.0
    return F.scaled_dot_product_attention(query, full_key, full_value)


@case(Reason.MUTATION, lambda: qkv(kv_heads=2))
def values_written_after_they_were_repeated(query, key, value):
    full_key, full_value = (x[:, :, None].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8) for x in (key, value))
    value.mul_(2.0)
    return F.scaled_dot_product_attention(query, full_key, full_value)


@case(Reason.MUTATION)
def keys_written_by_an_activation(query, key, value):
    scores = logits(query, key)
    F.relu(key, inplace=True)
    return torch.softmax(scores, dim=-1) @ value


@case(Reason.MUTATION)
def queries_written_by_an_activation_named_by_position(query, key, value):
    scores = logits(query, key)
    F.elu(query, 1.0, True)
    return torch.softmax(scores, dim=-1) @ value


@case(Reason.MUTATION)
def keys_written_in_a_list(query, key, value):
    scores = logits(query, key)
    torch._foreach_mul_([key], 2.0)
    return torch.softmax(scores, dim=-1) @ value


@case(Reason.MUTATION)
def keys_written_through_a_view_of_another_name(query, key, value):
    scores = logits(query, key)
    same, _ = torch.broadcast_tensors(key, query)
    same[0].mul_(3.0)
    return torch.softmax(scores, dim=-1) @ value


@case(Reason.MUTATION)
def keys_written_through_a_view_named_by_keywords(query, key, value):
    scores = logits(query, key)
    torch.transpose(input=key, dim0=0, dim1=1).mul_(3.0)
    return torch.softmax(scores, dim=-1) @ value


def _hidden():
    return (*qkv(), torch.ones(5, 5, dtype=torch.bool).triu(1))


@case(Reason.MUTATION, _hidden)
def hidden_positions_written_between_fill_and_values(query, key, value, hidden):
    weights = torch.softmax(logits(query, key).masked_fill(hidden, float("-inf")), dim=-1)
    hidden.zero_()
    return weights @ value


@case(Reason.MUTATION, _hidden)
def hidden_positions_written_after_a_finite_fill(query, key, value, hidden):
    weights = torch.softmax(logits(query, key).masked_fill(hidden, torch.finfo(torch.float32).min), dim=-1)
    hidden.logical_not_()
    return weights @ value


@case(Reason.MUTATION, _hidden)
def visible_positions_written_between_where_and_values(query, key, value, visible):
    weights = torch.softmax(torch.where(visible, logits(query, key), float("-inf")), dim=-1)
    visible.fill_(True)
    return weights @ value


@case(Reason.MASK, _hidden)
def truth_values_added(query, key, value, more):
    """A sum adds one where they are true; a mask hides where they are false."""
    return torch.softmax(logits(query, key) + more, dim=-1) @ value


@case(Reason.MASK)
def whole_numbers_added(query, key, value):
    return torch.softmax(logits(query, key) + torch.arange(5), dim=-1) @ value
