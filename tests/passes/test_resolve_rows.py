"""Compact caches: the rows that are there, under the mask of the rows that the model believes in."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_fx.compact_calls import CompactCalls
from avl_fx.errors import CacheStateError
from avl_fx.kernels.append_rows import append_rows
from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.finish_outputs import finish_outputs
from avl_fx.passes.lower import lower
from avl_fx.passes.nodes import op
from avl_fx.passes.resolve_rows import resolve_rows
from avl_fx.passes.site import Reason
from avl_fx.plan import Plan
from tests.passes._graphs import TOLERANCE, assert_same, rewrite

HEADS, KV_HEADS, DIM = 4, 2, 8
STAGES = (find_attention, resolve_rows, lower, finish_outputs)
PLAN = Plan.avl(text=None)
FINGERPRINT = PLAN.fingerprint()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    repeated = (x[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).flatten(1, 2) for x in (key, value))
    return F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.25)


def step(query, key, value, stored_key, stored_value, length, mask, extra="nothing"):
    """One layer's update and attention, as `AVLCache` has them traced."""
    key = append_rows(stored_key, key, length, FINGERPRINT)
    value = append_rows(stored_value, value, length, FINGERPRINT)
    out = attend(query, key, value, mask)
    if extra == "sum":
        return out, key, value, key.sum()
    return (out, key[:, :, 1:], value) if extra == "view" else (out, key, value)


def draw(generator, *sizes):
    return torch.randn(*sizes, generator=generator)


@st.composite
def situations(draw_):
    batch, queries, length = draw_(st.integers(1, 3)), draw_(st.integers(1, 4)), draw_(st.integers(3, 9))
    kept = [
        draw_(st.lists(st.integers(0, length - 1), min_size=1, max_size=length, unique=True).map(sorted))
        for _ in range(batch)
    ]
    return {
        "batch": batch,
        "queries": queries,
        "length": length,
        "kept": kept,
        "mask": draw_(st.sampled_from(["none", "bool", "additive", "one for all", "per head"])),
        "seed": draw_(st.integers(0, 10**6)),
        "dynamic": draw_(st.booleans()),
    }


RAGGED = {"batch": 2, "queries": 3, "length": 5, "kept": [[0, 1, 2, 4], [3]], "seed": 0, "dynamic": False}


@settings(max_examples=25, deadline=None)
@given(situations())
@example({**RAGGED, "mask": "bool"})
@example({**RAGGED, "mask": "additive"})
def test_attention_over_stored_rows_is_attention_without_the_others(case):
    generator = torch.Generator().manual_seed(case["seed"])
    batch, queries, length = case["batch"], case["queries"], case["length"]
    assume(queries > 1 or case["mask"] != "none")  # there the ranges that a step reads leave out what is missing
    total, rows = length + queries, max(map(len, case["kept"]))
    full = [draw(generator, batch, KV_HEADS, total, DIM) for _ in range(2)]
    query = draw(generator, batch, HEADS, queries, DIM)
    columns = torch.tensor([kept + [-1] * (rows - len(kept)) for kept in case["kept"]])
    there = torch.zeros(batch, total, dtype=torch.bool)
    there[:, length:] = True
    for row, kept in enumerate(case["kept"]):
        there[row, kept] = True
    sizes = {"one for all": (1, 1), "per head": (batch, HEADS)}.get(case["mask"], (batch, 1))
    seen = torch.rand(*sizes, queries, total, generator=generator) > 0.3
    seen[..., length:] = True  # nobody is blind
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = {"none": None, "additive": additive}.get(case["mask"], seen)
    # What is not there may hold anything, if nobody reads it.
    stored = [x.gather(2, columns.clamp(min=0)[:, None, :, None].expand(-1, KV_HEADS, -1, DIM)).clone() for x in full]
    for x in stored:
        x.masked_fill_((columns < 0)[:, None, :, None], 3.0)
    hidden = there[:, None, None] if mask is None else seen & there[:, None, None]
    expected = attend(query, *full, hidden)

    new = [x[:, :, length:].clone() for x in full]
    mark = [(at, 2) for at in range(5)] if case["dynamic"] else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompactCalls, "inputs", lambda self, args, state: (columns,) if self.takes_columns else ())
        with torch.no_grad():
            got = rewrite(step, query, *new, *stored, length, mask, stages=STAGES, plan=PLAN, mark=mark)
    assert torch.allclose(got.outputs[0], expected, atol=10 * TOLERANCE[torch.float32])
    assert_same(got.outputs[1:], [torch.cat(pair, 2) for pair in zip(stored, new, strict=True)])


def arguments(stored=5, length=5, queries=1, batch=2):
    generator = torch.Generator().manual_seed(0)
    query = draw(generator, batch, HEADS, queries, DIM)
    rows = [draw(generator, batch, KV_HEADS, n, DIM) for n in (queries, queries, stored, stored)]
    return query, *rows, length, torch.ones(batch, 1, queries, length + queries, dtype=torch.bool)


def test_no_operator_is_left_and_the_mask_is_made_once():
    def two_layers(query, key, value, stored_key, stored_value, length, mask):
        first = step(query, key, value, stored_key, stored_value, length, mask)
        return first, step(first[0], key, value, stored_value, stored_key, length, mask)

    got = rewrite(two_layers, *arguments(), stages=STAGES, plan=PLAN)
    names = [op(n) for n in got.gm.graph.nodes]
    assert "append_rows" not in names
    assert names.count("gather") == 1
    assert got.result("resolve_rows").count == 4
    assert got.result("resolve_rows").new_inputs == ("avl_columns",)


def test_a_plan_that_leaves_nothing_out_needs_no_columns():
    got = rewrite(step, *arguments(), stages=STAGES)
    assert got.result("resolve_rows").new_inputs == ()
    assert got.ctx.compact.columns is None
    assert "append_rows" not in [op(n) for n in got.gm.graph.nodes]


def test_a_prompt_needs_no_columns():
    got = rewrite(step, *arguments(stored=0, length=0, queries=4), stages=STAGES, plan=PLAN)
    assert got.result("resolve_rows").new_inputs == ()
    assert got.ctx.compact.stored == []


@pytest.mark.parametrize("extra", ["sum", "view"])
def test_other_readers_keep_the_operator(extra):
    """They would read other rows than the model means, so the cache has to be complete."""
    args = arguments()
    got = rewrite(step, *args, extra, stages=STAGES, plan=PLAN)
    assert_same(got.outputs, step(*args, extra))
    assert got.reasons == [Reason.COMPACT_ROWS]
    assert [op(n) for n in got.gm.graph.nodes].count("append_rows") >= 1
    with pytest.raises(CacheStateError, match="holds 4 rows of 5 tokens"):
        rewrite(step, *arguments(stored=4), extra, stages=STAGES, plan=PLAN)


@pytest.mark.parametrize("plan", [PLAN, Plan.identity()], ids=["partitioned", "identity"])
def test_missing_rows_that_nobody_knows_are_an_error(plan):
    with pytest.raises(CacheStateError, match=r"holds 3 rows of 5 tokens.*Fix: use a fresh AVLCache"):
        rewrite(step, *arguments(stored=3), stages=STAGES, plan=plan)


def test_a_mask_that_is_short_of_columns_is_refused():
    query, key, value, stored_key, stored_value, length, _ = arguments()
    args = (query, key, value, stored_key, stored_value, length, torch.ones(2, 1, 1, 1, dtype=torch.bool))
    got = rewrite(step, *args, stages=STAGES, plan=PLAN)
    assert got.reasons == [Reason.COMPACT_ROWS]
    assert_same(got.outputs, step(*args))


def test_the_operator_insists_on_a_complete_cache():
    _, key, _, stored, *_ = arguments()
    assert torch.equal(append_rows(stored, key, 5, ""), torch.cat([stored, key], 2))
    with pytest.raises(RuntimeError, match=r"holds 5 rows of 9 tokens.*Fix: compile the model"):
        append_rows(stored, key, 9, "")
    torch.library.opcheck(torch.ops.avl.append_rows.default, (stored, key, 5, "x"))
