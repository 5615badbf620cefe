"""The ordered table of stages, and the loop that runs, times and verifies them."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import fx

from avl_fx.passes.absorb_latents import absorb_latents
from avl_fx.passes.add_features import add_features
from avl_fx.passes.append_in_place import append_in_place
from avl_fx.passes.context import PassContext
from avl_fx.passes.filter_prompt import filter_prompt
from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.finish_outputs import finish_outputs
from avl_fx.passes.inherit_scores import inherit_scores
from avl_fx.passes.inline_regions import inline_regions
from avl_fx.passes.locate_modalities import locate_modalities
from avl_fx.passes.lower import lower
from avl_fx.passes.narrow_linears import narrow_linears
from avl_fx.passes.observe_attention import observe_attention
from avl_fx.passes.partition_modalities import partition_modalities
from avl_fx.passes.read_once import read_once
from avl_fx.passes.resolve_rows import resolve_rows
from avl_fx.passes.share_queries import share_queries
from avl_fx.passes.site import PassResult
from avl_fx.passes.spread_keys import spread_keys
from avl_fx.passes.substitute_visual import substitute_visual
from avl_fx.passes.verify import GraphFacts, verify

__all__ = ["STAGES", "run_stages"]

Pass = Callable[[fx.GraphModule, PassContext], PassResult]

STAGES: tuple[Pass, ...] = (
    inline_regions,  # what is checkpointed is a part of the graph like any other
    find_attention,  # every attention call -> one canonical avl::attention node
    absorb_latents,  # decode steps attend to the latents that a cache stores, not to keys made from all of them
    locate_modalities,  # where the row-wise visual positions come from
    observe_attention,  # calibration: a prompt also returns the attention rows of its last query
    resolve_rows,  # a compact cache: the rows that are there for those that the model believes in
    share_queries,  # lazy blocks inherit queries and keys; dead projections and key writes go
    spread_keys,  # a compact cache: keys that it stores for a lazy layer, among those that it does not
    substitute_visual,  # or inherit them at visual positions
    partition_modalities,  # decode reads text and core; the rest of the visual keys is skipped
    append_in_place,  # a growing cache is not copied at each step
    read_once,  # what else a decode step attends to on a CPU, one pass over its keys
    inherit_scores,  # lazy layers take their anchor's logits: decode steps read no keys, or none that are visual
    add_features,  # features that enter by position are added everywhere, so that a prompt can drop tokens before
    filter_prompt,  # behind one layer a prompt runs on the visual tokens that matter
    lower,  # canonical nodes -> operators Inductor knows
    narrow_linears,  # linear layers on a few rows read their weight once
    finish_outputs,  # outputs as the runtime expects them
)
"""All stages, in the order they run. A new pass is one new file and one line here."""


def run_stages(gm: fx.GraphModule, ctx: PassContext, stages: tuple[Pass, ...] = STAGES) -> list[PassResult]:
    """Run ``stages`` on ``gm`` in place, with the IR verifier after each.

    Raises:
        VerifierError: when a stage breaks a rule; ``gm`` must then be thrown away.
    """
    ctx.initially_unused = frozenset(n for n in gm.graph.nodes if not n.users and n.op != "output")
    facts = GraphFacts.of(gm)
    results = []
    for stage in stages:
        start = time.perf_counter()
        result = stage(gm, ctx)
        facts = verify(gm, facts, ctx, result)
        result.seconds = time.perf_counter() - start
        results.append(result)
    gm.recompile()
    return results
