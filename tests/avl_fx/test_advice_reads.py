"""Advice for plans that partition: each line appears where it is true, and not otherwise."""

import pytest
import torch

import avl_fx
from avl_fx._advice_reads import READS_RULES, how_to_name_them
from avl_fx.partition import MOST_RANGES
from avl_fx.plan import Plan
from avl_fx.record import Undivided
from avl_fx.report import DecodeReads
from tests.avl_fx._explained import NOT_TOLD, growing, spans, tiny, tiny_inputs

VISUAL = spans("..########...", ".....######..")
PLAN = Plan.avl(text=None)


pytestmark = pytest.mark.usefixtures("one_thread")


def advice(*args, **kwargs):
    return "\n".join(growing(*args, **kwargs).advice)


def test_nothing_to_say():
    report = growing(PLAN, VISUAL)
    assert report.advice == ()
    assert report.decode_reads.steps == {"core": 3, "secondary": 1}


# ---- why a cache was not partitioned ---------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["torch.compile", "avl_fx.compile"])
def test_unknown_positions(door):
    report = growing(PLAN, VISUAL, door=door, told=NOT_TOLD)
    line = report.advice[0]
    assert line.startswith("No visual positions were found. If the prompt has images, ")
    assert "with avl_fx.modality_ids(ids): model.generate(...)" in line
    assert ("use avl_fx.compile(model, plan=...)" in line) == (door == "torch.compile")
    assert "No visual positions" not in "\n".join(report.advice[1:])  # said once
    assert report.decode_reads.undivided == "visual positions unknown"
    assert report.decode_reads.steps == {"all": 4}
    assert report.decode_reads.total is None
    assert {s.detail for s in report.sites} == {"not in this run: visual positions unknown"}
    words = " ".join(str(report).split())
    assert "The cache was not partitioned: visual positions unknown." in words
    assert "decode steps of this run: 4 dense" in words
    assert "nothing is lost" not in words


def test_other_plans_are_told_less():
    report = growing(Plan.lazy([(0, 1)]), VISUAL, told=NOT_TOLD)
    (line,) = (line for line in report.advice if "visual positions" in line)
    assert "policies for visual keys would not apply" in line


def test_no_visual_tokens():
    report = growing(PLAN, VISUAL, told=torch.zeros_like(VISUAL))
    assert report.advice[0].startswith("The inputs hold no visual tokens")
    assert report.visual == ((), ())
    # A row without an image beside one with is an ordinary batch.
    assert growing(PLAN, spans("..########...", ".............")).advice == ()


def test_positions_that_do_not_fit():
    assert "do not fit the cache" in advice(PLAN, VISUAL, told=VISUAL[:1])


def test_a_mask_that_hides_visual_keys():
    visible = torch.ones_like(VISUAL)
    visible[0, 4] = False
    for always in (False, True):  # nor may a decode step start late
        report = growing(PLAN, VISUAL, visible=visible, always=always)
        assert report.advice[0].startswith("The attention mask hides visual keys")
        assert report.decode_reads.steps == {"all": 4}
    visible[0, 4], visible[0, :2] = True, False  # padding in front hides none
    assert growing(PLAN, VISUAL, visible=visible).advice == ()


def test_visual_tokens_in_too_many_pieces():
    pieces = spans("#." * 4 * MOST_RANGES)
    line = advice(PLAN, pieces)
    assert f"more than {MOST_RANGES} ranges of keys" in line
    assert "text=None" not in line
    # A text window cuts ranges once more, and needs room for them.
    fewer = spans("#." * (MOST_RANGES - 3))
    assert "or a plan with text=None" in advice(Plan.avl(text=0.5), fewer)
    assert "ranges" not in advice(PLAN, fewer)


@pytest.mark.parametrize("why", Undivided)
def test_every_reason_has_a_remedy(why):
    class Facts:
        plan, front_door = PLAN, "torch.compile"
        reads = DecodeReads({"all": 1}, str(why), 3, 0, (), (), None, {})

    (line,) = READS_RULES[0](Facts)
    assert line.endswith("Until then every step reads every key, which is exact.")
    assert how_to_name_them(Facts).startswith("use avl_fx.compile")


def test_a_state_that_was_lost():
    report = growing(PLAN, VISUAL, between=lambda cached: [t.clone() for t in cached])
    assert report.decode_reads.undivided is None
    assert report.advice[0].startswith("4 of 4 decode steps read every key: the cache was copied")
    assert "visual positions" not in "\n".join(report.advice)


def test_a_state_that_was_lost_on_the_way():
    def copied_once():
        copies = iter([False, False, True, False])
        return lambda cached: [t.clone() for t in cached] if next(copies) else cached

    report = growing(PLAN, VISUAL, between=copied_once())
    assert report.advice[0].startswith("2 of 4 decode steps read every key")
    assert report.decode_reads.steps == {"core": 2, "all": 2}
    assert [s.attention == s.attention_plan_flops for s in report.savings] == [False, True]
    assert report.decode_reads.keys == 15  # figures are those of the last step that had its state
    late = growing(PLAN, VISUAL, between=copied_once(), always=True)
    assert late.advice[0].startswith("1 of 4 decode steps read every key")
    assert late.decode_reads.steps == {"core": 3, "all": 1}
    assert late.decode_reads.keys == 17


# ---- little to gain --------------------------------------------------------------------------------------------------


def test_core_without_a_token():
    few = spans(".###.........", "..########...")
    line = "Batch row 0 has 3 visual tokens, of which int(0.3 * 3) = 0 are core: only refreshes see them. "
    assert f"{line}Use a larger core." in advice(PLAN, few)
    always = Plan.avl(core=0.3, secondary=0.3, refresh=0, text=None)
    assert "int(0.3 * 3) = 0 are secondary: no decode step sees them" in advice(always, few)
    neither = Plan.avl(core=0.3, secondary=0.32, text=None)
    assert "0 are core: no decode step sees them" in advice(neither, few)
    assert "int(" not in advice(Plan.avl(core=0.4, text=None), few)


def test_little_gained():
    short = spans("####" + "." * 60)
    line = advice(PLAN, short)
    assert "Little is gained: the average step reads 4% less. Visual tokens are 6% of the keys" in line
    assert "Little is gained" not in advice(PLAN, spans("########" + "." * 56))
    # Of a window on text alone the visual tokens say nothing.
    assert "Little is gained" not in advice(Plan.avl(core=1.0, secondary=1.0, text=0.6), short[:, :20])


def test_a_text_window_that_leaves_nothing_out_yet():
    line = advice(Plan.avl(text=0.6), VISUAL)
    assert "The text window leaves out nothing yet: behind the first visual token stand 7 text tokens at most" in line
    assert "60% of them, but at least 20" in line
    assert "leaves out nothing" not in advice(Plan.avl(text=0.6, text_minimum=2), VISUAL)
    assert "leaves out nothing" not in advice(PLAN, VISUAL)


def test_a_text_window_copies_a_cache_that_grows():
    assert "Under a text window a growing cache is copied at each step (8.5 KiB" in advice(Plan.avl(), VISUAL)
    assert "copied at each step" not in advice(PLAN, VISUAL)


def test_sites_without_a_cache():
    report = avl_fx.explain(tiny(), PLAN, **tiny_inputs())
    assert "Layers 0-1 of layers refused (it keeps no cache): without a cache" in "\n".join(report.advice)
    assert report.decode_reads is None
