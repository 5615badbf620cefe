"""What a decode step reads: the formulas, the key ranges that the runtime makes, and steps as they really ran."""

import functools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import avl_fx
import avl_fx.kernels.inherited_decode as inherited_decode
import avl_fx.kernels.partitioned_decode as operator
from avl_fx._words import kib
from avl_fx.kernels.partitioned_decode import native
from avl_fx.partition import Partition
from avl_fx.plan import Plan
from avl_fx.policies import TextPolicy, VisionPolicy
from avl_fx.reads import PromptRow, mean_over_period, reads_secondary, rows_read, text_kept
from avl_fx.report import StepCost
from avl_fx.savings import attention_flops, cache_bytes, dense_cache_bytes, kv_bytes, spare_bytes
from tests.avl_fx._explained import growing, partitioned, spans, zoo_model
from tests.zoo import get
from tests.zoo._run import prefill_and_decode

FLOAT, BATCH, STEPS = 4, 2, 4


pytestmark = pytest.mark.usefixtures("one_thread")


def covered(segments, keys):
    """Rows that the key ranges of one batch row name, each once."""
    return len({p for start, length in segments.tolist() for p in range(start, min(start + length, keys))})


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_visual_rows_by_hand():
    """100 keys, 41 of them visual: int(0.3 * 41) = 12 are core, int(0.5 * 41) = 20 secondary."""
    row, policy = PromptRow(visual=41, text=0), VisionPolicy(core=0.3, secondary=0.5, refresh=3)
    assert [rows_read(row, 100 + t, t, policy, None) for t in (1, 2, 3, 4)] == [72, 73, 82, 75]
    assert rows_read(row, 101, 1, policy, None, secondary=True) == 80
    assert mean_over_period(72, 81, policy) == 75
    always = VisionPolicy(core=0.3, secondary=0.5, refresh=0)
    assert rows_read(row, 101, 1, always, None) == 80
    assert mean_over_period(72, 81, always) == 81
    assert rows_read(PromptRow(visual=0, text=0), 101, 1, policy, None) == 101
    assert mean_over_period(72, 81, None) == 81


def test_text_rows_by_hand():
    """50 text keys behind the first image: round(0.6 * 50) = 30 stay, and the new one is read with them."""
    policy = TextPolicy(budget=0.6, minimum=20)
    assert [text_kept(n, policy) for n in (10, 20, 21, 33, 34, 35, 50)] == [10, 20, 20, 20, 20, 21, 30]
    assert text_kept(50, None) == 50
    row = PromptRow(visual=5, text=50)
    assert [rows_read(row, 100 + t, t, None, policy) for t in (1, 2, 11)] == [81, 102 - 51 + 31, 111 - 60 + 36]
    # In the long run a window grows by its budget for each token.
    assert rows_read(row, 10_100, 10_000, None, policy) - rows_read(row, 5_100, 5_000, None, policy) == 3000
    # Rows without an image keep all their text.
    assert rows_read(PromptRow(visual=0, text=50), 101, 1, None, policy) == 101


# ---- against the state of the runtime --------------------------------------------------------------------------------


@st.composite
def caches(draw):
    """Visual positions of ragged rows, and what is padding in front of the first of them."""
    length = draw(st.integers(1, 24))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    visual = torch.tensor(draw(st.lists(flags, min_size=1, max_size=3)))
    visible = torch.ones_like(visual)
    for row, flags in enumerate(visual.tolist()):
        first = flags.index(True) if True in flags else length - 1
        visible[row, : draw(st.integers(0, first))] = False
    return visual, visible


@st.composite
def sections(draw):
    secondary = draw(st.floats(0.1, 1.0))
    vision = VisionPolicy(core=draw(st.floats(0.05, secondary)), secondary=secondary, refresh=draw(st.integers(0, 4)))
    budget, minimum = draw(st.floats(0.1, 0.95)), draw(st.integers(0, 6))
    return vision, draw(st.sampled_from([None, TextPolicy(budget=budget, minimum=minimum)]))


@given(caches(), sections(), st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_the_formula_is_what_the_ranges_name(cache, policies, steps):
    (visual, visible), (vision, text) = cache, policies
    partition = Partition.start(vision, visual, text, visible)
    assume(partition is not None)
    counts = (visual.cumsum(1) > 0) & ~visual & visible
    rows = [PromptRow(int(v), int(t)) for v, t in zip(visual.sum(1), counts.sum(1), strict=True)]
    length = visual.shape[1]

    def forget(appended):
        if partition.text is not None:
            partition.text.forget(0, torch.rand(len(rows), 1, partition.length), appended)
            partition.text.settle(appended)

    forget(appended=False)
    for step in range(1, steps + 1):
        assert partition.reads_secondary == reads_secondary(step, vision)
        for buffer in (length + step, length + steps + 7):  # a cache that grows, and one of a fixed length
            read = [covered(segments, buffer) for segments in partition.segments]
            assert read == [rows_read(row, buffer, step, vision, text) for row in rows]
        if partition.text is not None:
            partition.text.append(partition.length)
        partition.length, partition.step = partition.length + 1, step
        forget(appended=True)


def test_hidden_keys_behind_an_image_count_as_read():
    """The one case in which the formula is a bound: padding behind the first visual key."""
    visual = torch.tensor([[False, True, True, False, False, False, False, False]])
    visible = torch.tensor([[True, True, True, True, True, False, False, True]])
    text = TextPolicy(budget=0.4, minimum=0)
    partition = Partition.start(VisionPolicy(core=1.0, secondary=1.0), visual, text, visible)
    partition.text.forget(0, torch.rand(1, 1, 8), False)
    partition.text.settle(False)
    assert covered(partition.segments[0], 9) == 5  # 0, 1, 2, one text key, the new one
    assert rows_read(PromptRow(visual=2, text=3), 9, 1, None, text) == 7


# ---- against steps that really ran -----------------------------------------------------------------------------------


LAZY_CORE = ("llava", "torch.compile", "dynamic", Plan.avl(0.3, 0.5, 3, text=None).combine(Plan.lazy([(1, 3)])))
STATIC_REFRESH = ("llava", "avl_fx.compile", "static", Plan.avl(0.2, 0.6, 2, text=0.5, text_minimum=4))
SLIDING = ("gemma3", "torch.compile", "dynamic", Plan.avl(0.3, 0.5, 0, text=0.4, text_minimum=3))
"""Model, front door, cache, plan. The last of the four steps is a core step, a refresh, one of `refresh=0`."""
CASES = {"lazy": LAZY_CORE, "static": STATIC_REFRESH, "sliding": SLIDING}


@functools.cache
def observed(name, door, kind, plan):
    """The report on a run whose calls of the kernel are counted: per step and layer rows read a batch row, and keys;
    and the cache of that run."""
    zoo, calls, caches = get(name), [], []

    def counting(kernel, value_at):
        """``kernel``, whose arguments hold value, new key, new value, mask and segments from ``value_at`` on."""

        def counted(*arguments):
            value, _, new_value, _, segments = arguments[value_at : value_at + 5]
            keys = value.shape[2] + (new_value is not None)
            calls.append(([covered(row, keys) for row in segments], keys))
            return kernel(*arguments)

        return counted

    def run(model, **inputs):
        caches.append(prefill_and_decode(model, inputs, kind, steps=STEPS).cache)

    native.is_available()  # has given the operators to PyTorch's dispatcher by now, from which they are taken back
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("avl", "IMPL") as dispatched:
        for called, table, value_at in (
            (operator.partitioned_decode, operator.IMPLEMENTATIONS, 2),
            (inherited_decode.anchor_decode, inherited_decode.ANCHOR_IMPLEMENTATIONS, 2),
            (inherited_decode.inherited_decode, inherited_decode.IMPLEMENTATIONS, 3),
        ):
            dispatched.impl(called.__name__, called, "CPU", allow_override=True)
            patch.setitem(table, "cpu", counting(table["cpu"], value_at))
        model = zoo_model(name)
        report = avl_fx.explain(model, plan, front_door=door, run=run, **zoo.inputs(model, BATCH))
    layers = zoo.attention_kinds.count("full")
    assert len(calls) == STEPS * layers
    return report, [calls[layers * step : layers * (step + 1)] for step in range(STEPS)], caches[0]


def prompt_rows(name):
    """What the prompt of the zoo holds, counted without the package."""
    zoo, model = get(name), zoo_model(name)
    inputs = zoo.inputs(model, BATCH)
    visual = zoo.visual_positions(model, inputs)
    text = (visual.cumsum(1) > 0) & ~visual & inputs["attention_mask"].bool()
    return [PromptRow(int(v), int(t)) for v, t in zip(visual.sum(1), text.sum(1), strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_every_step_reads_what_the_formula_says(case):
    name, _, _, plan = CASES[case]
    _, steps, _ = observed(*CASES[case])
    rows = prompt_rows(name)
    for number, calls in enumerate(steps, 1):
        for read, keys in calls:
            assert read == [rows_read(row, keys, number, plan.vision_policy, plan.text_policy) for row in rows]
            assert sum(read) < BATCH * keys


@pytest.mark.parametrize("case", CASES)
def test_explain_says_what_the_last_step_read(case):
    name, _, _, plan = CASES[case]
    zoo, vision, rows = get(name), plan.vision_policy, prompt_rows(name)
    report, steps, _ = observed(*CASES[case])
    reads, ((read, keys), *_) = report.decode_reads, steps[-1]
    assert (reads.keys, reads.undivided) == (keys, None)
    kinds = ["secondary" if reads_secondary(t, vision) else "core" for t in range(1, STEPS + 1)]
    assert reads.steps == {kind: kinds.count(kind) for kind in kinds}
    assert [(r.visual_tokens, r.core_tokens, r.secondary_tokens) for r in reads.rows] == [
        (r.visual, int(vision.core * r.visual), int(vision.secondary * r.visual)) for r in rows
    ]
    a_row = kv_bytes(1, zoo.kv_heads, 1, zoo.head_dim, zoo.head_dim, FLOAT)
    a_product = attention_flops(1, zoo.heads, 1, 1, zoo.head_dim, zoo.head_dim)
    for layer in reads.layers:
        last = getattr(layer.costs, kinds[-1])
        assert layer.partitioned == (zoo.attention_kinds[layer.layer] == "full")
        if layer.partitioned:
            if case == "lazy" and layer.layer > 1:  # reads its anchor's logits instead of keys
                logits = sum(read) * zoo.heads * FLOAT
                assert last == StepCost(sum(read) * a_row // 2 + logits, sum(read) * a_product // 2)
            else:
                assert last == StepCost(sum(read) * a_row, sum(read) * a_product)
            assert layer.costs.dense == StepCost(BATCH * keys * a_row, BATCH * keys * a_product)
        else:
            assert last == layer.costs.dense == layer.costs.mean
    assert [layer.layer for layer in reads.layers] == list(range(zoo.decoder_layers))
    for kind in ("dense", kinds[-1], "mean"):
        parts = [getattr(layer.costs, kind) for layer in reads.layers]
        whole = getattr(reads.total, kind)
        assert whole.kv_bytes == pytest.approx(sum(p.kv_bytes for p in parts))
        assert whole.attention_flops == pytest.approx(sum(p.attention_flops for p in parts))


@pytest.mark.parametrize("case", ["lazy", "static"])
def test_explain_says_what_is_stored(case):
    """What a step does not read is stored all the same: less is stored of lazy layers only."""
    report, _, cache = observed(*CASES[case])
    assert not report.kv.measured
    marker = FLOAT if case == "lazy" else 0
    assert report.kv.plan == cache_bytes(cache) - marker
    assert report.kv.dense == dense_cache_bytes(cache)
    assert (report.kv.plan < report.kv.dense) == (case == "lazy")


def test_room_for_later_tokens_is_not_cache():
    """By shapes: a buffer of ceil((65 + 256) / 64) * 64 rows for 69 tokens, in the six tensors that are stored."""
    _, _, cache = observed(*LAZY_CORE)
    a_tensor = 2 * 2 * 16 * FLOAT  # batch, KV heads, head dim
    assert spare_bytes(cache) == 6 * (384 - 69) * a_tensor
    assert cache_bytes(cache) == 6 * 69 * a_tensor + FLOAT
    _, _, static = observed(*STATIC_REFRESH)
    assert spare_bytes(static) == 0
    name, door, _, plan = LAZY_CORE
    measured = partitioned(name, door, plan, STEPS + 1)
    assert measured.kv.measured
    assert (measured.kv.plan, measured.kv.spare_bytes) == (cache_bytes(cache), spare_bytes(cache))
    assert f"room for later tokens takes {kib(spare_bytes(cache))} more" in " ".join(str(measured).split())


def test_what_explain_advises_for_them():
    advice = {case: "\n".join(observed(*settings)[0].advice) for case, settings in CASES.items()}
    sliding = (
        "Layers 0-1 of model.language_model.layers refused (its mask depends on the order of the keys): dense under"
    )
    assert {case for case, lines in advice.items() if sliding in lines} == {"sliding"}
    copied = "Under a text window a growing cache is copied at each step"
    assert {case for case, lines in advice.items() if copied in lines} == {"sliding"}  # a static one is not


def test_attention_of_the_average_step():
    report, _, _ = observed(*LAZY_CORE)
    prompt, decode = report.savings
    total = report.decode_reads.total
    assert decode.attention == total.dense.attention_flops
    assert decode.attention_plan_flops == total.mean.attention_flops
    assert total.mean.attention_flops * 3 == 2 * total.core.attention_flops + total.secondary.attention_flops
    # The prompt is dense, and scores its visual keys once in each layer that owns keys: 0 and 1.
    assert prompt.attention_plan_flops - prompt.attention == 2 * 2 * BATCH * 4 * 65 * 16


def test_later_steps_follow_the_formula():
    a_token = 2 * 2 * 2 * 16 * FLOAT * 4  # keys and values, batch, KV heads, head dim, bytes, layers
    reads = observed(*LAZY_CORE)[0].decode_reads
    # Two layers are lazy: they read a float32 logit for each query head instead of a key.
    lazy = a_token - a_token // 4 + 2 * BATCH * get("llava").heads * FLOAT
    for more, costs in reads.later.items():
        for kind, each in (("dense", a_token), ("core", lazy), ("secondary", lazy), ("mean", lazy)):
            grown = getattr(costs, kind).kv_bytes - getattr(reads.total, kind).kv_bytes
            assert grown == pytest.approx(more * each)
    reads = observed(*SLIDING)[0].decode_reads
    assert reads.total.core is None
    assert reads.total.mean == reads.total.secondary
    grown = reads.later[1024].mean.kv_bytes - reads.later[256].mean.kv_bytes
    # Two of four layers have a window of their own, and do not grow; the others do by the budget.
    assert grown == pytest.approx(0.4 * 768 * a_token / 2, rel=0.01)
    assert observed(*STATIC_REFRESH)[0].decode_reads.later == {}


@pytest.mark.parametrize("plan", [Plan.identity(), Plan.avl(core=1.0, secondary=1.0, text=None)])
def test_plans_that_partition_nothing_say_nothing(plan):
    report = growing(plan, spans("..####.."), steps=2)
    assert report.decode_reads is None
    assert "decode step reads" not in str(report)
    assert all(s.attention == s.attention_plan_flops for s in report.savings)
