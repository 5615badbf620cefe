"""The IR verifier: runs between stages and fails loudly on anything a rewrite must never do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import alias_root, fake, mutated_inputs, mutations, shape
from avl_fx.passes.site import PassResult
from avl_fx.passes.unrepeat import is_repeated

__all__ = ["GraphFacts", "VerifierError", "verify"]


class VerifierError(RuntimeError):
    """A stage left the graph in a state that may not reach the next one."""


@dataclass(frozen=True)
class GraphFacts:
    """What must survive every stage."""

    placeholders: tuple[str, ...]
    writes: tuple[str, ...]
    """Names of the in-place writes, in program order."""
    input_writes: tuple[tuple[str, str], ...]
    """``(write, input)``: those of them that a caller sees."""
    outputs: int

    @classmethod
    def of(cls, gm: fx.GraphModule) -> GraphFacts:
        """Read the facts off ``gm``."""
        output = next(n for n in gm.graph.nodes if n.op == "output")
        writes = mutations(gm.graph.nodes)
        roots = [(n.name, alias_root(target)) for n in writes for target in mutated_inputs(n)]
        return cls(
            tuple(n.name for n in gm.graph.nodes if n.op == "placeholder"),
            tuple(n.name for n in writes),
            tuple((name, root.name) for name, root in roots if root.op in ("placeholder", "get_attr")),
            len(output.args[0]),
        )


def verify(gm: fx.GraphModule, before: GraphFacts, ctx: PassContext, result: PassResult) -> GraphFacts:
    """Check ``gm`` after the stage that returned ``result``.

    Returns:
        The facts to hold the next stage against.

    Raises:
        VerifierError: naming the stage and the broken rule.
    """
    stage = result.name
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise VerifierError(f"{stage}: malformed graph: {error}") from error
    facts = GraphFacts.of(gm)
    if facts.placeholders != (*before.placeholders, *result.new_inputs):
        raise VerifierError(f"{stage}: the graph's inputs changed")
    allowed = tuple(name for name in before.writes if name not in result.dropped_mutations)
    if tuple(name for name in facts.writes if name not in result.added_mutations) != allowed:
        raise VerifierError(
            f"{stage}: in-place writes were lost, added or reordered: {sorted(set(facts.writes) ^ set(allowed))}"
        )
    dropped = {before.placeholders[d.placeholder] for d in ctx.dropped_keys if d.placeholder is not None}
    for write, target in before.input_writes:
        if write not in facts.writes and target not in dropped:
            raise VerifierError(f"{stage}: {write} writes to {target}, which no site gave up")
    expected = before.outputs
    if stage == "finish_outputs":
        expected += len(ctx.returned()) - len(set(ctx.emptied()))
    if facts.outputs != expected:
        raise VerifierError(f"{stage}: the number of outputs changed")
    nodes = set(gm.graph.nodes)
    for site in ctx.sites:
        if site.node is not None and site.node not in nodes:
            raise VerifierError(f"{stage}: site {site.index} lost its node {site.node.name}")
    for node in gm.graph.nodes:
        if node.target is torch.ops.avl.attention.default:
            if stage in ("lower", "finish_outputs"):
                raise VerifierError(f"{stage}: canonical node {node.name} was not lowered")
            _check_canonical(node, ctx, stage)
    return facts


def _check_canonical(node: fx.Node, ctx: PassContext, stage: str) -> None:
    arguments: tuple[Any, ...] = node.args
    query, key, value, mask, _, is_causal, index = arguments
    if not 0 <= index < len(ctx.sites) or ctx.sites[index].node is not node:
        raise VerifierError(f"{stage}: {node.name} carries no site")
    q, k, v = (shape(n) or () for n in (query, key, value))
    if (len(q), len(k), len(v)) != (4, 4, 4):
        raise VerifierError(f"{stage}: {node.name} has an operand without a 4-d fake value")
    if k[1] != v[1] or q[1] % k[1]:
        raise VerifierError(f"{stage}: {node.name} reads {k[1]} key and {v[1]} value heads for {q[1]}")
    if str(q[3]) != str(k[3]):
        raise VerifierError(f"{stage}: {node.name} multiplies {q[3]} by {k[3]} dimensions")
    if is_repeated(key) and is_repeated(value):
        raise VerifierError(f"{stage}: {node.name} reads repeated keys and values")
    if mask is not None and is_causal:
        raise VerifierError(f"{stage}: {node.name} has a mask and is causal")
    expected = (*q[:3], v[3])
    recorded = fake(node)
    if [str(s) for s in recorded.shape] != [str(s) for s in expected] or recorded.dtype != fake(query).dtype:
        raise VerifierError(f"{stage}: {node.name} is recorded as {tuple(recorded.shape)}, a run gives {expected}")
    if len({fake(n).dtype for n in (query, key, value)}) != 1:
        raise VerifierError(f"{stage}: {node.name} mixes dtypes")
