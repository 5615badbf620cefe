"""Checkpointed regions become parts of the graph: the same values, gradients and saved bytes; sites as elsewhere."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from avl_fx.passes.inline_regions import inline_regions
from avl_fx.passes.site import Reason
from avl_fx.record import recording
from tests.passes._graphs import check, counts, rewrite

HEADS, DIM = 2, 8
checkpointed = functools.partial(checkpoint, use_reentrant=False)


def attend(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, N, HEADS * DIM]: self-attention, an MLP and what both leave behind for the gradient."""
    q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in (x @ weight, x @ weight.t(), x))
    return torch.tanh(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) @ weight)


def layers(x: Tensor, weight: Tensor) -> Tensor:
    for _ in range(3):
        x = checkpointed(attend, x, weight)
    return x


def arguments() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, HEADS * DIM, generator=generator, requires_grad=True)
    return x, torch.randn(HEADS * DIM, HEADS * DIM, generator=generator).requires_grad_()


def gradients(function: Any, *given: Tensor) -> list[Tensor]:
    result = function(*given)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), given)]


def compiled(function: Any, compiler: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="avl", options={"compiler": compiler, "strict": True}, fullgraph=True)


def test_every_region_is_a_part_of_the_graph() -> None:
    rewritten = check(layers, *arguments())
    assert rewritten.result("inline_regions").count == 3
    assert rewritten.result("find_attention").count == 3
    assert "tag_activation_checkpoint" not in counts(rewritten.gm)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_gradients(compiler: str) -> None:
    got = gradients(compiled(layers, compiler), *arguments())
    for ours, eager in zip(got, gradients(layers, *arguments()), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


def saved_bytes(function: Any) -> int:
    """What the compiled forward keeps for the gradient, besides its inputs and states of the random generator."""
    given = arguments()
    result = function(*given)
    kept = {t.untyped_storage().data_ptr(): t.nbytes for t in result.grad_fn.saved_tensors if t.is_floating_point()}
    for tensor in given:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_what_is_kept_for_the_gradient_is_what_checkpointing_keeps() -> None:
    def kept_all(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(3):
            x = attend(x, weight)
        return x

    torch._dynamo.reset()
    theirs = saved_bytes(torch.compile(layers, backend="aot_eager", fullgraph=True))
    assert 0 < saved_bytes(compiled(layers)) <= theirs < saved_bytes(compiled(kept_all)) / 3


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_what_is_drawn_at_random_is_drawn_once(compiler: str) -> None:
    """Computed again for the gradient, dropout drops the same."""

    def drops(x: Tensor, weight: Tensor) -> Tensor:
        return checkpointed(lambda x, weight: F.dropout(torch.exp(x @ weight), 0.5), x, weight)

    x, _ = arguments()
    identity = torch.eye(HEADS * DIM).requires_grad_()
    result = compiled(drops, compiler)(x, identity)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(gradient == 0, result == 0)
    assert 0 < (result == 0).float().mean() < 1


def test_a_region_in_a_region_and_more_than_one_result() -> None:
    def inner(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return attend(x, weight), x * 2

    def outer(x: Tensor, weight: Tensor) -> Tensor:
        first, second = checkpointed(inner, torch.sin(x), weight)
        return first + torch.cos(second) @ weight

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return checkpointed(outer, x, weight) + checkpointed(inner, x, weight)[1]

    rewritten = check(function, *arguments())
    assert rewritten.result("inline_regions").count == 3
    assert "tag_activation_checkpoint" not in counts(rewritten.gm)
    for ours, eager in zip(gradients(compiled(function), *arguments()), gradients(function, *arguments()), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


def test_what_a_region_writes_in_place_is_written() -> None:
    def writes(x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight
        y.mul_(2).add_(1)
        return attend(y, weight)

    rewritten = check(lambda x, weight: checkpointed(writes, x, weight), *arguments())
    assert rewritten.result("inline_regions").added_mutations == ("mul_", "add_")


def test_a_region_with_a_policy_of_its_own_is_left_alone() -> None:
    def keep_products(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(keep_products)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return checkpointed(attend, checkpointed(attend, x, weight, context_fn=contexts), weight)

    rewritten = rewrite(function, *arguments(), stages=(inline_regions,))
    assert rewritten.result("inline_regions").count == 1
    assert rewritten.reasons == [Reason.REGION]
    for ours, eager in zip(gradients(compiled(function), *arguments()), gradients(function, *arguments()), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


@torch.compiler.nested_compile_region
def compiled_once(x: Tensor, weight: Tensor) -> Tensor:
    return attend(x, weight)


class WithItsOwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x[None]
        return (torch.softmax(x @ x.transpose(-1, -2), -1) @ x)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


OTHERS = {
    "invoke_subgraph": lambda x, weight: compiled_once(compiled_once(x, weight), weight),
    "cond": lambda x, weight: torch.cond(x.sum() > 0, attend, lambda x, weight: torch.softmax(x, -1), (x, weight)),
    "autograd_function_apply": lambda x, weight: WithItsOwnGradient.apply(x) @ weight,
}


@pytest.mark.parametrize("region", OTHERS)
def test_attention_in_another_region_is_refused_by_name(region: str) -> None:
    with recording() as recorder:
        got = gradients(compiled(OTHERS[region]), *arguments())
    for ours, eager in zip(got, gradients(OTHERS[region], *arguments()), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)
    (graph,) = recorder.graphs
    assert [(s.reason, s.detail) for s in graph.sites] == [(Reason.REGION, region)] * len(graph.sites)
    assert len(graph.sites) == (2 if region == "invoke_subgraph" else 1)
