"""A part of a graph on fewer positions: as if it had been called with what is left of its inputs, or refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avl_fx.kernels import attention as _attention  # noqa: F401
from avl_fx.kernels.survivors import survivors
from avl_fx.passes.fewer_rows import CannotShorten, FewerRows, tail_of
from avl_fx.passes.nodes import op

DIM, HEADS = 8, 2
WEIGHT = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)) / 3


def rotated(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    position = torch.arange(x.shape[1])
    return h * torch.cos(position[None, :, None] * 0.3) + F.linear(h, WEIGHT)


def beside(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return F.silu(h).view(h.shape[0], x.shape[1], HEADS, -1).transpose(1, 2) @ WEIGHT[:4, :3] + x[:, None, :, :1]


def attention(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (F.linear(t, WEIGHT).view(len(h), x.shape[1], HEADS, -1).transpose(1, 2) for t in (h, h, x))
    k = torch.cat([k.new_empty(len(h), HEADS, 0, DIM // HEADS), k], 2)
    out = torch.ops.avl.attention(q, k, v, mask, 0.5, False, 0)
    return out.transpose(1, 2).reshape(len(h), x.shape[1], -1) + h


def own_buffer(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    h = h.clone()
    h.mul_(2.0)
    h += x
    return h


def the_end(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return h[:, -2:] * 2 + h[:, -1, :][:, None]


def by_feature(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Look-ups and sums along other dimensions than the sequence, and numbers written under a mask of tokens."""
    best = h.topk(2, -1).indices
    weights = h.new_zeros(h.shape).scatter_(2, best, h.gather(2, best).softmax(-1))
    weights[x[..., 0] > 0] = 0.25
    weights[x[..., 1] > 0] = WEIGHT[0]
    return weights.index_select(2, torch.arange(DIM).flip(0)) + h[..., torch.tensor([1, 0] * (DIM // 2))]


def counted(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Sizes that are computed from the length."""
    return h.reshape(len(h), x.shape[1] * 2, DIM // 2).mul(2.0).reshape(h.shape)


ACCEPTED = (rotated, beside, attention, own_buffer, the_end, by_feature, counted)


def writes(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return x.add_(h) + h


def written_later(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    y = x * 2
    before = h + y
    y.mul_(3.0)
    return before + (h + y)


def put_anywhere(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    h = h.clone()
    h[:, torch.arange(h.shape[1]).flip(0)] = x
    return h


def put_one_after_another(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """The last token that names a place has it."""
    table = h.new_zeros(4, DIM)
    table[h[0, :, 0].sign().long() + 1] = h[0]
    return h + table[0]


def of_visual_tokens(h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """What the n-th positive token gets is the n-th row of something."""
    h = h.clone()
    h[x[..., 0] > 0] = x[x[..., 0] > 0] * 2
    return h


REFUSED = {
    "mean": lambda h, x, mask: h - h.mean(1, keepdim=True),
    "first": lambda h, x, mask: h[:, 0],
    "middle": lambda h, x, mask: h[:, 2:5],
    "nonzero": lambda h, x, mask: h[h > 0],
    "counted": lambda h, x, mask: h.repeat(1, x.shape[1] * 2, 1)[:, -1],
    "writes": writes,
    "written later": written_later,
    "running sum": lambda h, x, mask: h.cumsum(1),
    "shifted": lambda h, x, mask: h + torch.cat([h.new_zeros(len(h), 1, DIM), h], 1)[:, 1:],
    "looked up": lambda h, x, mask: h[:, torch.arange(h.shape[1]).flip(0)],
    "selected": lambda h, x, mask: h.index_select(1, torch.arange(h.shape[1]).flip(0)),
    "gathered": lambda h, x, mask: h.gather(-2, (x > 0).long()),
    "put": put_anywhere,
    "put one after another": put_one_after_another,
    "of visual tokens": of_visual_tokens,
    "scattered": lambda h, x, mask: h.masked_scatter(x[..., :1] > 0, x.reshape(-1)),
    "added up": lambda h, x, mask: h.index_add(1, torch.zeros_like(h[0, :, 0], dtype=torch.long), x),
    "softmax": lambda h, x, mask: h.softmax(1),
    "normed": lambda h, x, mask: F.normalize(h),
    "attention of its own": lambda h, x, mask: F.scaled_dot_product_attention(h, h, h),
}


class Outcome:
    refusal: str | None = None
    tail = 0


def run(
    body, batch: int, lengths: tuple[int, ...], outcome: Outcome, any_batch: bool = True
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each length: what the body gives, what the rewritten graph gives, and which rows are left."""

    def function(x: Tensor, may: Tensor) -> tuple[Tensor, Tensor]:
        position = torch.arange(x.shape[1])
        visual = ((position > 0) & (position < x.shape[1] - 3)).expand(len(x), -1)
        rows, _ = survivors(x.sum(-1)[:, None], visual, None, may, 0.5, 2)
        mask = (position <= position[:, None]).expand(len(x), 1, -1, -1)
        return body(x.neg(), x, mask), rows

    def backend(gm, inputs):
        (cut,) = (n for n in gm.graph.nodes if op(n) == "neg")
        output = next(n for n in gm.graph.nodes if n.op == "output")
        rows = next(n for n in output.args[0] if op(n) == "getitem" and op(n.args[0]) == "survivors")
        nodes, outcome.tail = list(gm.graph.nodes), tail_of(cut)
        try:
            shortened = FewerRows(cut, rows)
        except CannotShorten as error:
            outcome.refusal = str(error)
            assert list(gm.graph.nodes) == nodes, "the graph is as it was"
            return gm.forward
        shortened.commit()
        result, _ = output.args[0]
        output.args = ((shortened.put_back(result, output, -7.0) if shortened.dims_of(result) else result, rows),)
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    found = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        for seed, length in enumerate(lengths):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(batch, length, DIM, generator=generator)
            given = x.clone()
            for dim in (0, 1) if batch > 1 and any_batch else (1,):
                torch._dynamo.mark_dynamic(given, dim)
            got, rows = compiled(given, torch.ones(1, dtype=torch.int32))
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].repeat(batch, 1, 1, 1)
            taken = torch.stack([m[..., r, :][..., r] for m, r in zip(mask, rows, strict=True)])
            left = torch.stack([t[r] for t, r in zip(x, rows, strict=True)])
            expected = Here(body, rows, length)(left, taken)
            found.append((got, expected, rows))
    torch._dynamo.reset()
    return found


class Here:
    """The body on what is left; what it makes of positions itself is taken there, too."""

    def __init__(self, body, rows: Tensor, length: int) -> None:
        self.body, self.rows, self.length = body, rows, length

    def __call__(self, left: Tensor, mask: Tensor) -> Tensor:
        if self.body is not rotated:
            return self.body(-left, left, mask)
        h = -left
        return h * torch.cos(self.rows[:, :, None] * 0.3) + F.linear(h, WEIGHT)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("body", ACCEPTED, ids=lambda body: body.__name__)
def test_it_computes_what_is_left(body, batch):
    outcome = Outcome()
    for got, expected, rows in run(body, batch, (17, 23), outcome):
        assert outcome.refusal is None
        assert rows.shape[1] < 23
        if body is the_end:
            assert torch.allclose(got, expected, atol=1e-6)
            continue
        dim = 2 if body is beside else 1
        index = rows.view(batch, *([1] * (dim - 1)), -1, *([1] * (got.dim() - dim - 1)))
        index = index.expand(*got.shape[:dim], rows.shape[1], *got.shape[dim + 1 :])
        assert torch.allclose(got.gather(dim, index), expected, atol=1e-5)
        assert (got.scatter(dim, index, -7.0) == -7.0).all(), "the others are filled"
    assert outcome.tail == (2 if body is the_end else 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_run_is_refused_and_left_alone(name, batch):
    outcome = Outcome()
    with contextlib.suppress(RuntimeError, ValueError, IndexError):  # on fewer rows it may not even run
        run(REFUSED[name], batch, (17,), outcome)
    assert outcome.refusal


@pytest.mark.parametrize(
    "body",
    [
        lambda h, x, mask: h + x[0, :, :1],
        lambda h, x, mask: h + x.flatten(0, 1).view(h.shape),
    ],
    ids=["one for all", "flat"],
)
def test_a_tensor_without_batch_is_refused_where_batch_rows_differ(body):
    single, several = Outcome(), Outcome()
    run(body, 1, (17,), single)
    run(body, 3, (17,), several)
    assert single.refusal is None
    assert several.refusal


def test_a_batch_size_that_is_a_constant_is_refused():
    """Any other dimension may have that size."""
    outcome = Outcome()
    run(rotated, 3, (17,), outcome, any_batch=False)
    assert outcome.refusal == "the batch size is a constant"
