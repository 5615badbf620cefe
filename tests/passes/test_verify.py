"""The verifier catches what a faulty stage would do. Every test plants one fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from avl_fx.passes.context import DroppedKeys, PassContext
from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.lower import lower
from avl_fx.passes.pipeline import STAGES, run_stages
from avl_fx.passes.rewrite import insert_call
from avl_fx.passes.site import PassResult
from avl_fx.passes.verify import GraphFacts, VerifierError, verify
from tests.passes._graphs import Rewritten, capture, find_node, rewrite


def decode(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Grouped attention with a static cache and an intermediate that is written."""
    keys.index_copy_(2, at, key)
    values.index_copy_(2, at, value)
    full_keys, full_values = (x.repeat_interleave(2, dim=1) for x in (keys, values))
    out = F.scaled_dot_product_attention(query, full_keys, full_values)
    scratch = torch.zeros(2, 4, 1, 8)
    scratch.add_(out)
    return scratch * 2


def arguments() -> tuple[Tensor, ...]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))

    return tensor(2, 4, 1, 8), *(tensor(2, 2, n, 8) for n in (1, 1, 6, 6)), torch.tensor([3])


@pytest.fixture
def found() -> Rewritten:
    """The graph after `find_attention`."""
    return rewrite(decode, *arguments(), stages=(find_attention,))


def attention(rewritten: Rewritten) -> fx.Node:
    (node,) = rewritten.canonical
    return node


def assert_caught(
    rewritten: Rewritten, fault: Callable[[], None], message: str, stage: str = "planted", **result: object
) -> None:
    """The graph passes before the fault, and fails after it, naming stage and rule."""
    before = GraphFacts.of(rewritten.gm)
    verify(rewritten.gm, before, rewritten.ctx, PassResult(stage if stage != "lower" else "planted"))
    fault()
    with pytest.raises(VerifierError, match=rf"{stage}: .*{message}"):
        verify(rewritten.gm, before, rewritten.ctx, PassResult(stage, **result))  # type: ignore[arg-type]


def test_a_sound_graph_passes(found: Rewritten) -> None:
    facts = verify(found.gm, GraphFacts.of(found.gm), found.ctx, PassResult("sound"))
    assert len(facts.writes) == 3
    assert [target for _, target in facts.input_writes] == ["l_keys_", "l_values_"]
    assert facts.outputs == 1


def test_a_lost_write(found: Rewritten) -> None:
    def fault() -> None:
        node = find_node(found.gm, "index_copy_")
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        found.gm.graph.erase_node(node)

    assert_caught(found, fault, "writes were lost")


def test_a_lost_write_that_the_stage_reports_but_no_site_gave_up(found: Rewritten) -> None:
    node = find_node(found.gm, "index_copy_")

    def fault() -> None:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        found.gm.graph.erase_node(node)

    assert_caught(found, fault, "which no site gave up", dropped_mutations=(node.name,))


def test_a_dropped_write_to_a_buffer_that_a_site_gave_up_passes(found: Rewritten) -> None:
    before = GraphFacts.of(found.gm)
    node = find_node(found.gm, "index_copy_")
    found.ctx.dropped_keys.append(DroppedKeys(0, 8, placeholder=before.placeholders.index("l_keys_")))
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    found.gm.graph.erase_node(node)
    verify(found.gm, before, found.ctx, PassResult("share", dropped_mutations=(node.name,)))


def test_an_added_write(found: Rewritten) -> None:
    assert_caught(found, lambda: insert_call(attention(found), "mul_", attention(found).args[0], 2.0), "added")


def test_reordered_writes(found: Rewritten) -> None:
    def fault() -> None:
        first, second = find_node(found.gm, "index_copy_"), find_node(found.gm, "index_copy_", 1)
        second.append(first)

    assert_caught(found, fault, "reordered")


def test_a_canonical_node_that_reads_before_it_is_made(found: Rewritten) -> None:
    def fault() -> None:
        next(n for n in found.gm.graph.nodes if n.op == "placeholder").prepend(attention(found))

    assert_caught(found, fault, "malformed graph")


@pytest.mark.parametrize("stage", ["lower", "finish_outputs"])
def test_a_canonical_node_left_over(found: Rewritten, stage: str) -> None:
    with pytest.raises(VerifierError, match=f"{stage}: canonical node .* was not lowered"):
        verify(found.gm, GraphFacts.of(found.gm), found.ctx, PassResult(stage))


def test_repeated_keys(found: Rewritten) -> None:
    def fault() -> None:
        node = attention(found)
        for position in (1, 2):
            node.update_arg(position, insert_call(node, torch.repeat_interleave, node.args[position], 2, dim=1))

    assert_caught(found, fault, "repeated keys and values")


def test_unequal_heads(found: Rewritten) -> None:
    def fault() -> None:
        node = attention(found)
        node.update_arg(1, insert_call(node, torch.repeat_interleave, node.args[1], 2, dim=1))

    assert_caught(found, fault, "4 key and 2 value heads")


def test_a_lost_site(found: Rewritten) -> None:
    def fault() -> None:
        node = attention(found)
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        found.gm.graph.erase_node(node)

    assert_caught(found, fault, "site 0 lost its node")


def test_a_canonical_node_without_a_site(found: Rewritten) -> None:
    assert_caught(found, lambda: found.ctx.sites.clear(), "carries no site")


def test_two_canonical_nodes_for_one_site(found: Rewritten) -> None:
    def fault() -> None:
        node = attention(found)
        insert_call(node, node.target, *node.args)  # type: ignore[arg-type]

    assert_caught(found, fault, "carries no site")


def test_changed_inputs(found: Rewritten) -> None:
    def fault() -> None:
        first = next(n for n in found.gm.graph.nodes if n.op == "placeholder")
        with found.gm.graph.inserting_before(first):
            found.gm.graph.placeholder("extra")

    assert_caught(found, fault, "inputs changed")


def test_reordered_inputs(found: Rewritten) -> None:
    def fault() -> None:
        first, second, *_ = (n for n in found.gm.graph.nodes if n.op == "placeholder")
        second.append(first)

    assert_caught(found, fault, "inputs changed")


@pytest.mark.parametrize("stage", ["planted", "finish_outputs"])
def test_changed_outputs(found: Rewritten, stage: str) -> None:
    def fault() -> None:
        output = next(n for n in found.gm.graph.nodes if n.op == "output")
        output.args = ((*output.args[0], attention(found)),)  # type: ignore[misc]

    if stage == "finish_outputs":
        lower(found.gm, found.ctx)
        before = GraphFacts.of(found.gm)
        output = next(n for n in found.gm.graph.nodes if n.op == "output")
        output.args = ((),)
        with pytest.raises(VerifierError, match="number of outputs"):
            verify(found.gm, before, found.ctx, PassResult(stage))
        return
    assert_caught(found, fault, "number of outputs", stage)


def test_a_wrong_fake_shape(found: Rewritten) -> None:
    def fault() -> None:
        attention(found).meta["example_value"] = attention(found).meta["example_value"][:, :2]

    assert_caught(found, fault, "is recorded as")


def test_a_wrong_fake_dtype(found: Rewritten) -> None:
    def fault() -> None:
        attention(found).meta["example_value"] = attention(found).meta["example_value"].double()

    assert_caught(found, fault, "is recorded as")


def test_an_operand_without_a_fake_value(found: Rewritten) -> None:
    assert_caught(found, lambda: attention(found).args[0].meta.pop("example_value"), "without a 4-d fake value")  # type: ignore[union-attr]


def test_an_operand_of_another_rank(found: Rewritten) -> None:
    def fault() -> None:
        node = attention(found)
        node.update_arg(0, insert_call(node, "flatten", node.args[0], 0, 1))

    assert_caught(found, fault, "without a 4-d fake value")


def test_mixed_dtypes(found: Rewritten) -> None:
    def fault() -> None:
        node = attention(found)
        node.update_arg(2, insert_call(node, "to", node.args[2], torch.bfloat16))

    assert_caught(found, fault, "mixes dtypes")


def test_query_and_key_of_different_dimension(found: Rewritten) -> None:
    def fault() -> None:
        node = attention(found)
        node.update_arg(0, insert_call(node, "narrow", node.args[0], 3, 0, 4))

    assert_caught(found, fault, "multiplies 4 by 8 dimensions")


def test_a_mask_beside_the_causal_flag(found: Rewritten) -> None:
    def fault() -> None:
        node = attention(found)
        node.update_arg(3, node.args[0])
        node.update_arg(5, True)

    assert_caught(found, fault, "has a mask and is causal")


def test_the_pipeline_verifies_after_every_stage() -> None:
    """A stage that breaks a rule stops the pipeline there, whichever it is."""
    for position in range(len(STAGES)):
        reached: list[str] = []

        def broken(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
            next(n for n in gm.graph.nodes if n.op == "placeholder").append(
                next(n for n in reversed(gm.graph.nodes) if n.op == "placeholder")
            )
            return PassResult("broken")

        def noting(stage: Callable[..., PassResult], seen: list[str] = reached) -> Callable[..., PassResult]:
            def run(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
                seen.append(stage.__name__)
                return stage(gm, ctx)

            return run

        stages = tuple(map(noting, STAGES))
        captured = capture(decode, *arguments())
        with pytest.raises(VerifierError, match="broken: the graph's inputs changed"):
            run_stages(captured.gm, captured.ctx, (*stages[:position], broken, *stages[position:]))
        assert reached == [s.__name__ for s in STAGES[:position]]
