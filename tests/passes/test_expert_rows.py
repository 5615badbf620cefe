"""Tokens that are sorted by expert and put back run on fewer rows; what is not proven to put them back is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations import moe as _registers_the_fallback  # noqa: F401

from tests.passes.test_fewer_rows import DIM, Outcome, run

EXPERTS, PER_TOKEN, INNER = 4, 2, 8
GENERATOR = torch.Generator().manual_seed(1)
ROUTER = torch.randn(EXPERTS, DIM, generator=GENERATOR)
UP = torch.randn(EXPERTS, DIM, 2 * INNER, generator=GENERATOR) / 3
DOWN = torch.randn(EXPERTS, INNER, DIM, generator=GENERATOR) / 3
BIAS = torch.randn(EXPERTS, DIM, generator=GENERATOR)


def fallback(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """What transformers calls where `grouped_mm` cannot be compiled."""
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, offs=offsets)


def grouped(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """bfloat16 is all that it is compiled for."""
    return F.grouped_mm(rows.bfloat16(), weight.bfloat16(), offs=offsets).float()


def inverse(order: Tensor) -> Tensor:
    back = torch.empty_like(order)
    back[order] = torch.arange(order.size(0))
    return back


def count(ids: Tensor) -> Tensor:
    return torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)


def by_hand(flat: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
    """Every expert on every token, and what is not wanted thrown away."""
    gate, up = torch.einsum("td,edi->tei", flat, UP).chunk(2, -1)
    each = torch.einsum("tei,eid->ted", F.silu(gate) * up, DOWN) + BIAS
    wanted = each.gather(1, ids[:, :, None].expand(-1, -1, DIM))
    return (wanted * scores[:, :, None]).sum(1)


def mixture(
    product=fallback,
    sort=torch.sort,
    token=lambda order: order // PER_TOKEN,
    offsets=lambda ids, original: torch.cumsum(count(ids), 0, dtype=torch.int32),
    score=lambda scores, order: scores[order],
    between=lambda rows, order: rows,
    back=inverse,
    finish=lambda out, order, back: out[back(order)],
):
    """A mixture of experts as transformers computes it, or with one step done otherwise."""

    def body(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        flat = h.reshape(-1, DIM)
        scores, chosen = F.linear(flat, ROUTER).softmax(-1).topk(PER_TOKEN)
        original = chosen.reshape(-1)
        ids, order = sort(original)
        ends = offsets(ids, original)
        rows = between(flat[token(order)], order)
        gate, up = product(rows, UP, ends).chunk(2, -1)
        out = product(F.silu(gate) * up, DOWN, ends)
        out.add_(BIAS[ids])
        out = out * score(scores.reshape(-1), order).unsqueeze(-1)
        out = finish(out, order, back)
        return out.view(flat.size(0), PER_TOKEN, DIM).sum(1).view(h.shape) + h

    return body


ACCEPTED = {
    "as transformers does": mixture(),
    "grouped_mm": mixture(product=grouped),
    "argsort puts back": mixture(back=torch.argsort),
    "index_select": mixture(
        score=lambda scores, order: scores.index_select(0, order),
        finish=lambda out, order, back: out.index_select(0, back(order)),
    ),
    "rows are normed": mixture(between=lambda rows, order: rows * rows.pow(2).mean(-1, keepdim=True).rsqrt()),
}


def off_by_one(order: Tensor) -> Tensor:
    back = torch.empty_like(order)
    back[order] = torch.arange(1, order.size(0) + 1)
    return back


def written_twice(order: Tensor) -> Tensor:
    back = inverse(order)
    back[order] = order
    return back


def negated(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    found[0].unsqueeze(-1).neg_()
    return found[0], found[1]


REFUSED = {
    "not put back": mixture(finish=lambda out, order, back: out),
    "put back by the order itself": mixture(back=lambda order: order),
    "other numbers": mixture(back=off_by_one),
    "an inverse that is written to": mixture(back=written_twice),
    "descending": mixture(sort=lambda ids: torch.sort(ids, descending=True)),
    "sorted tokens": mixture(finish=lambda out, order, back: out[back(order)] + out),
    "another token": mixture(token=lambda order: (order + 1) // PER_TOKEN % (order.size(0) // PER_TOKEN)),
    "tokens of half the pairs": mixture(token=lambda order: order // (2 * PER_TOKEN)),
    "scores as they stood": mixture(score=lambda scores, order: scores),
    "ends of the unsorted": mixture(offsets=lambda ids, original: torch.cumsum(ids[:EXPERTS], 0, dtype=torch.int32)),
    "other bins": mixture(
        offsets=lambda ids, original: torch.cumsum(
            torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS), 0, dtype=torch.int32
        )
    ),
    "experts that are not counted up": mixture(offsets=lambda ids, original: count(ids).int()),
    "a running sum": mixture(between=lambda rows, order: rows.cumsum(0)),
    "less the mean": mixture(between=lambda rows, order: rows - rows.mean(0, keepdim=True)),
    "softmax over tokens": mixture(between=lambda rows, order: rows.softmax(0)),
    "ids written through a view": mixture(sort=lambda ids: negated(torch.sort(ids))),
    "counts that overflow": mixture(offsets=lambda ids, original: torch.cumsum(count(ids), 0, dtype=torch.int8).int()),
    "the order as a feature": mixture(between=lambda rows, order: rows + order[:, None]),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ACCEPTED)
def test_experts_compute_what_is_left(name, batch):
    outcome = Outcome()
    for got, expected, rows in run(ACCEPTED[name], batch, (17, 23), outcome):
        assert outcome.refusal is None
        index = rows[:, :, None].expand(-1, -1, DIM)
        assert torch.allclose(got.gather(1, index), expected, atol=1e-5)
        assert (got.scatter(1, index, -7.0) == -7.0).all(), "the others are filled"


@pytest.mark.parametrize("name", sorted({*ACCEPTED} - {"rows are normed"}))
def test_they_compute_what_every_expert_on_every_token_says(name):
    """The bodies of this file are mixtures of experts at all."""
    h = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(2))
    flat = h.reshape(-1, DIM)
    scores, ids = F.linear(flat, ROUTER).softmax(-1).topk(PER_TOKEN)
    assert torch.allclose(ACCEPTED[name](h, h, h), by_hand(flat, scores, ids).view_as(h) + h, atol=0.03)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proven_is_refused(name):
    outcome = Outcome()
    with contextlib.suppress(RuntimeError, ValueError, IndexError):  # some of them do not compute anything sensible
        run(REFUSED[name], 3, (17,), outcome)
    assert outcome.refusal
