"""Dynamo graphs for tests: capture one, run stages on it, run the result, compare it with eager.

Everything goes through `torch.compile`, so the passes see the graphs that they see in use. The rewritten graph itself
runs op by op: canonical nodes run the reference implementation.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from avl_fx import _compat
from avl_fx.passes.context import PassContext
from avl_fx.passes.nodes import fake, op
from avl_fx.passes.pipeline import STAGES, Pass, run_stages
from avl_fx.passes.site import PassResult, Reason, Site
from avl_fx.plan import Plan
from avl_fx.record import GraphRecord
from avl_fx.runtime import CompiledGraph

__all__ = ["TOLERANCE", "Mark", "Rewritten", "assert_same", "capture", "check", "counts", "find_node", "rewrite"]

Mark = tuple[int, int]
"""``(argument, dimension)`` that Dynamo shall treat as symbolic, unless the code fixes its size."""

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""Largest difference from eager over the largest value. Eager rounds probabilities to the dtype, the passes do not."""


@dataclass
class Rewritten:
    """A graph after the stages, what they reported, and what it computed."""

    gm: fx.GraphModule
    ctx: PassContext
    results: list[PassResult]
    new_guards: int = 0
    """Guards that the stages put on symbolic sizes: each may cost a recompilation."""
    outputs: list[Any] = field(default_factory=list)
    """Flattened outputs of the compiled function."""
    arguments: Any = None
    """The compiled function's arguments after the call."""

    @property
    def sites(self) -> list[Site]:
        return self.ctx.sites

    @property
    def site(self) -> Site:
        """The only site."""
        assert len(self.sites) == 1, [s.style for s in self.sites]
        return self.sites[0]

    def result(self, stage: str) -> PassResult:
        """What ``stage`` reported."""
        return next(r for r in self.results if r.name == stage)

    @property
    def reasons(self) -> list[Reason | None]:
        """Why each site was refused."""
        return [s.reason for s in self.sites]

    @property
    def canonical(self) -> list[fx.Node]:
        """The canonical nodes still in the graph."""
        return [n for n in self.gm.graph.nodes if n.target is torch.ops.avl.attention.default]


def rewrite(
    function: Callable[..., Any],
    *args: Any,
    stages: tuple[Pass, ...] = STAGES,
    plan: Plan | None = None,
    dynamic: bool | None = None,
    mark: Sequence[Mark] = (),
    aot: bool = False,
    edit: Callable[[PassContext], None] | None = None,
) -> Rewritten:
    """Compile ``function`` with a backend that runs ``stages``, and call it once with ``args``.

    Args:
        function: a function or module that Dynamo captures as one graph.
        args: its arguments; written to where the function writes to them.
        stages: which stages to run; without `lower` the canonical nodes run their reference.
        plan: the plan, identity if not given.
        dynamic: as in `torch.compile`.
        mark: dimensions of arguments to mark dynamic.
        aot: trace the result through AOTAutograd, as Inductor would, instead of running it node by node.
        edit: last change to the context before the stages run.
    """
    made: list[Rewritten] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        modules = _compat.frame_modules()
        ctx = PassContext(plan or Plan.identity(), modules.module, modules.decoder_layers())
        if edit is not None:
            edit(ctx)
        gm = _compat.copy_module(gm)
        before = _guards(gm)
        results = run_stages(gm, ctx, stages)
        made.append(Rewritten(gm, ctx, results, _guards(gm) - before))
        compiled = _compat.compile_graph(gm, example_inputs, "aot_eager" if aot else "eager", {})
        record = GraphRecord(index=0, nodes_before=0)
        if "finish_outputs" not in [r.name for r in results]:
            return CompiledGraph(compiled, (), tuple(ctx.dropped_keys), False, record)
        return CompiledGraph.of(compiled, ctx, record)

    torch._dynamo.reset()
    for position, dim in mark:
        torch._dynamo.maybe_mark_dynamic(args[position], dim)
    outputs = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    # AOTAutograd asks Dynamo to start over when it finds a symbolic float, with that float fixed.
    assert len(made) == 1 or (aot and len(made) == 2), f"{len(made)} graphs"
    made[-1].outputs, made[-1].arguments = pytree.tree_leaves(outputs), args
    return made[-1]


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Rewritten:
    """The graph as Dynamo made it, with an empty context: for tests that call one stage by hand."""
    return rewrite(function, *args, stages=(), **kwargs)


def check(function: Callable[..., Any], *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Rewritten:
    """`rewrite`, and compare the outputs and the written arguments with eager.

    Rows that are NaN in eager (a softmax over nothing) are left out: the canonical node gives zeros there.
    """
    expected_args, actual_args = copy.deepcopy(args), copy.deepcopy(args)
    expected = pytree.tree_leaves(function(*expected_args))
    rewritten = rewrite(function, *actual_args, **kwargs)
    assert_same(rewritten.outputs, expected, dtype)
    assert_same(_tensors(rewritten.arguments), _tensors(expected_args), dtype)
    return rewritten


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def assert_same(actual: Sequence[Any], expected: Sequence[Any], dtype: torch.dtype = torch.float32) -> None:
    """Same values within the tolerance of ``dtype``, same dtypes and shapes."""
    assert len(actual) == len(expected)
    for position, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        if not isinstance(wanted, Tensor):
            assert got == wanted, position
            continue
        assert got.shape == wanted.shape, position
        assert got.dtype == wanted.dtype, position
        if not wanted.dtype.is_floating_point:
            assert torch.equal(got, wanted), position
            continue
        defined = ~wanted.isnan()
        if not defined.any():
            continue
        wanted, got = wanted[defined].double(), got[defined].double()
        finite = wanted.isfinite()
        assert torch.equal(got[~finite], wanted[~finite]), position
        difference = (got - wanted)[finite].abs().max().item() if finite.any() else 0.0
        largest = wanted[finite].abs().max().item() if finite.any() else 0.0
        assert difference <= TOLERANCE[dtype] * max(largest, 1e-6), f"output {position}: {difference} of {largest}"


def counts(gm: fx.GraphModule) -> Counter[str]:
    """Operator name -> number of nodes; a linear layer counts as one whatever kernel it goes to."""
    return Counter(op(n).removeprefix("narrow_") for n in gm.graph.nodes if op(n))


def find_node(gm: fx.GraphModule, name: str, which: int = 0) -> fx.Node:
    """The ``which``-th node that applies operator ``name``."""
    return [n for n in gm.graph.nodes if op(n) == name][which]


def _guards(gm: fx.GraphModule) -> int:
    for node in gm.graph.nodes:
        mode = getattr(fake(node), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return len(mode.shape_env.guards)
    return 0
