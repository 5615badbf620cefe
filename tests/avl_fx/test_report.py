"""The report as a table and as data."""

import copy
import dataclasses
import io
import json
import pickle

import pytest
import torch
from rich.console import Console

import avl_fx
from avl_fx._render import _lines, _outcome
from avl_fx._words import ascii_only, count, flops, flops_change, kib, percent, ranges, seconds, symbols
from avl_fx.errors import OptionError
from avl_fx.report import Report, SiteReport
from tests.avl_fx._explained import (
    LAZY,
    encodes_images_ahead,
    explained,
    growing,
    spans,
    tiny,
    tiny_inputs,
    zoo_model,
)

SITE = SiteReport(
    graph=0,
    phases=("prefill",),
    tower="layers",
    role="decoder",
    layer=0,
    module_path="layers.0.attn",
    module_class="Attention",
    kind="full",
    style="sdpa",
    batch=1,
    queries=5,
    keys=5,
    heads=4,
    kv_heads=2,
    head_dim=8,
    value_dim=8,
    dtype="float32",
    device="cpu",
    mask="bool",
    cache="dynamic",
    unrepeated=True,
    visual="none",
    status="rewritten",
    action="dense",
    reason=None,
    detail="",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llava() -> Report:
    return explained("llava")


@pytest.fixture(scope="module")
def refusing() -> Report:
    return avl_fx.explain(tiny(rank=3), **tiny_inputs())


@pytest.fixture(scope="module")
def avl() -> Report:
    """Partitioned, with a text window and a lazy layer; five batch rows, the last without an image."""
    plan = avl_fx.Plan.avl(text=0.5, text_minimum=2).combine(avl_fx.Plan.lazy([(0, 1)]))
    rows = ("..########...", ".....####....", ".##....##....", "..##########.", ".............")
    return growing(plan, spans(*rows), steps=5)


def sites(layers: range, **changes) -> list[SiteReport]:
    return [dataclasses.replace(SITE, **{"layer": n, "module_path": f"layers.{n}.attn", **changes}) for n in layers]


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_table_is_ascii_and_fits(llava, refusing, avl, width):
    for report in (llava, refusing, avl):
        text = report.render(width=width, color=False)
        assert text.isascii()
        assert max(map(len, text.splitlines())) <= width
        assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_table_says_what_matters(llava):
    text = llava.render(width=100)
    words = " ".join(text.split())
    for part in (
        "avl_fx explain: LlavaForConditionalGeneration",
        "lazy: gla 1..3",
        "torch.compile, compiler eager; 1 prefill, 2 decode",
        "4 layers expected; prefill saw 4; decode saw 4",
        "row 1: 3-18, 22-37, 40-55 (48 tokens)",
        "Decoder model.language_model.layers: 4 layers of 4, heads 4, KV heads 2, head dim 16",
        "1 x 66, 1 x n + 1",
        "28 -> 24",
        "of these saved",
        "137 -> 103 kFLOP",
        "keys of layers 2-3 are not stored",
        "tracing and compiling",
        "find_attention",
    ):
        assert part in words, part
    eager = "* The vision encoder model.vision_tower ran eagerly"
    assert (eager in words) == encodes_images_ahead(zoo_model("llava"))
    lazy = [line for line in text.splitlines() if "lazy (anchor 1)" in line]
    assert len(lazy) == 2  # one line for prefill, one for decode
    assert all(" 2-3 " in line for line in lazy)


def test_table_says_what_a_decode_step_reads(avl):
    text = avl.render(width=100)
    words = " ".join(text.split())
    for part in (
        "prefill 0 13 x 13 bool dynamic full anchor, then partitioned",
        "1 13 x 13 bool dynamic full lazy (anchor 0), then partitioned",
        "anchor, partitioned: core 0.3,",
        "secondary 0.5 every 3 steps, text 0.5",
        "rows that a step does not read are stored as before: nothing is lost",
        "keys and values dense core step refresh, 1 in 3 average",
        "layer 0 ",
        "layer 1 ",
        "all layers",
        "256 tokens later",
        "1,024 tokens later",
        "attention FLOPs",
        "keys 18 in each of 5 batch rows",
        "visual 8, 4, 4, 10, ... tokens: core 2, 1, 1, 3, ...; secondary 4, 2, 2, 5, ...",
        "text 8, 9, 13, 6, ... tokens behind the first visual one: read 5, 5, 7, 3, ...",
        "Lazy layers take their anchor's logits, a float32 number for each query head, and read no keys.",
        "decode steps of this run: 4 core, 1 refresh",
    ):
        assert part in words, part
    assert "(unchanged)" not in words
    assert "GPU" not in words
    on_gpu = dataclasses.replace(avl, sites=tuple(dataclasses.replace(s, device="cuda") for s in avl.sites))
    assert "On a GPU refreshes and steps under a text window go over the keys twice" in " ".join(str(on_gpu).split())


def test_plans_in_words():
    """What an outcome says of a decode step."""

    def said(**settings):
        report = growing(avl_fx.Plan.avl(**{"text": None, **settings}), spans("..########..."), steps=1)
        (action,) = {s.action for s in report.sites if s.phases == ("decode",)}
        (prompt,) = {s.action for s in report.sites if s.phases == ("prefill",)}
        assert prompt == "dense, then partitioned"
        return action.removeprefix("partitioned: ")

    assert said() == "core 0.3, secondary 0.5 every 3 steps"
    assert said(refresh=0) == said(refresh=1) == "secondary 0.5"
    assert said(secondary=1.0, refresh=2) == "core 0.3, secondary 1 every 2 steps"
    assert said(core=1.0, secondary=1.0, text=0.6) == "text 0.6"
    chosen = {"spread": 0.5, "scores": "per_kv_head"}
    assert said(refresh=0, text=0.6, **chosen) == "secondary 0.5, scores per_kv_head, spread 0.5, text 0.6"


def test_outcomes_of_two_sections():
    """A site that is lazy, and was then refused or not partitioned, is both."""
    (site,) = sites(range(1), action="lazy (anchor 0)", status="refused", reason="no")
    assert _outcome(site).plain == "lazy (anchor 0); refused: no"
    (site,) = sites(range(1), status="refused", reason="no", detail="why")
    assert _outcome(site).plain == "refused: no (why)"
    (site,) = sites(range(1), action="dense, then partitioned", detail="not in this run: x")
    assert _outcome(site).plain == "dense, then partitioned (not in this run: x)"
    assert _outcome(site).style == "yellow"


def test_table_shows_reasons(refusing):
    words = " ".join(str(refusing).split())
    assert "refused: query, key or value is not 4-dimensional" in words
    assert "Layers 0-1 of layers refused (query, key or value is not 4-dimensional)" in words


def test_brackets_are_no_markup(llava):
    report = dataclasses.replace(llava, advice=("see [bold]this[/bold]",), plan_text="[red]é", stopped="[x]")
    text = report.render(color=False)
    assert "see [bold]this[/bold]" in text
    assert "[red]?" in text
    assert "[x]" in text


def test_color_follows_the_terminal(llava, monkeypatch):
    assert "\x1b[" not in str(llava)
    assert "\x1b[" in llava.render(color=True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = str(llava)
    assert "\x1b[" in text
    plain = llava.render(width=70, color=False).splitlines()
    assert len(text.splitlines()) == len(plain)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in str(llava)


def test_rich_and_notebooks_show_it(llava):
    console = Console(file=io.StringIO(), width=100)
    console.print(llava)
    assert "lazy (anchor 1)" in console.file.getvalue()
    html = llava._repr_html_()
    assert html.startswith("<pre")
    assert "lazy (anchor 1)" in html


def test_runs_of_equal_layers_share_a_line():
    def lines(sites):
        return [(phase, layers) for phase, layers, _ in _lines(sites)]

    assert lines(sites(range(12))) == [("prefill", "0-11")]
    assert lines(sites(range(2)) + sites(range(3, 5))) == [("prefill", "0-1"), ("prefill", "3-4")]
    mixed = sites(range(1)) + sites(range(1, 3), kind="sliding") + sites(range(3, 4))
    assert lines(mixed) == [("prefill", "0"), ("prefill", "1-2"), ("prefill", "3")]
    both = sites(range(2)) + sites(range(2), graph=1, phases=("decode",)) + sites(range(2), graph=2, phases=("decode",))
    assert lines(both) == [("prefill", "0-1"), ("decode", "0-1")]
    assert lines(sites(range(2), phases=("prefill", "decode"))) == [("prefill", "0-1"), ("decode", "0-1")]
    two_in_one = sites(range(2)) + sites(range(2), kind="cross")
    assert lines(two_in_one) == [("prefill", "0-1"), ("prefill", "0-1")]
    assert lines(sites(range(2), layer=None)) == [("prefill", "?")]
    refused = sites(range(2), status="refused", reason="x") + sites(range(2, 3), status="refused", reason="y")
    assert lines(refused) == [("prefill", "0-1"), ("prefill", "2")]


def test_words():
    assert ranges([3, 1, 2, 7, 2]) == "1-3, 7"
    assert ranges([]) == ""
    assert (count(1, "layer"), count(2, "layer")) == ("1 layer", "2 layers")
    assert [flops(n) for n in (0, 999, 999.9, 11304960, 3.2e12, 5e17)] == [
        "0 FLOP",
        "999 FLOP",
        "1 kFLOP",
        "11.3 MFLOP",
        "3.2 TFLOP",
        "500 PFLOP",
    ]
    assert flops_change(34.4e6, 31.2e6) == "34.4 -> 31.2 MFLOP"
    assert flops_change(1.2e6, 999) == "1.2 MFLOP -> 999 FLOP"
    assert flops_change(999, 1) == "999 -> 1 FLOP"
    assert [kib(n) for n in (4, 1024, 137216, 5 * 2**20, 3 * 2**40)] == [
        "4 B",
        "1.0 KiB",
        "134.0 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]
    assert (seconds(0.02), seconds(2.04), percent(1, 4), percent(1, 0)) == ("20 ms", "2.0 s", "25%", "0%")
    assert [symbols(s) for s in (7, "s53 + 1", "s1*s2 + s1", "Max(1, u0)")] == ["7", "n + 1", "n*m + n", "Max(1, n)"]
    assert ascii_only("é×") == "??"


# ---- the data --------------------------------------------------------------------------------------------------------


def test_json_round_trip(llava):
    data = json.loads(llava.to_json())
    assert data == llava.to_dict()
    assert data["format"] == 1
    assert list(data) == list(json.loads(explained("plain_lvlm").to_json()))
    assert data["plan"] == {"version": 1, "lazy": {"blocks": [[1, 3]], "mode": "gla"}}
    assert avl_fx.Plan.from_dict(data["plan"]) == avl_fx.Plan.lazy([(1, 3)])
    assert data["decoder"] == {
        "expected": 4,
        "seen": {"prefill": [0, 1, 2, 3], "decode": [0, 1, 2, 3]},
        "graphs": {"prefill": 1, "decode": 1},
    }
    assert data["visual"][1] == [[3, 16], [22, 16], [40, 16]]
    assert [site["layer"] for site in data["sites"] if site["action"].startswith("lazy")] == [*LAZY] * 3
    assert "before" not in data["graphs"][0]
    assert data["versions"]["torch"] == torch.__version__


def test_json_names_its_units(avl):
    data = json.loads(avl.to_json())
    assert data == avl.to_dict()
    reads = data["decode_reads"]
    assert (reads["keys"], reads["refresh_every_steps"], reads["undivided"]) == (18, 3, None)
    assert reads["steps"] == {"core": 4, "secondary": 1}
    assert reads["rows"][0] == {
        "visual_tokens": 8,
        "core_tokens": 2,
        "secondary_tokens": 4,
        "text_tokens": 8,
        "text_tokens_read": 5,
    }
    assert reads["rows"][4]["text_tokens"] is None
    assert reads["total"].keys() == {"dense", "core", "secondary", "mean"}
    assert reads["total"]["dense"] == {"kv_bytes": 2 * 5 * 18 * 2 * 16 * 4, "attention_flops": 2 * 5 * 18 * 2 * 2 * 16}
    # 18 keys in each row but 6, 3, 3, 7 and no visual ones, and 3, 4, 6, 3 and no old text.
    rows = 5 * 18 - 19 - 16
    # Keys and values of the anchor; in the lazy layer values, and a logit for each of two query heads.
    assert reads["total"]["core"]["kv_bytes"] == (2 + 1) * rows * 16 * 4 + rows * 2 * 4
    assert [layer["layer"] for layer in reads["layers"]] == [0, 1]
    assert reads["later"].keys() == {"256", "1024"}
    assert data["kv"]["spare_bytes"] is None  # the cache was not the report's to measure
    assert [s["attention_plan_flops"] < s["attention"] for s in data["savings"]] == [False, True]


def test_report_is_plain_data(llava):
    twin = pickle.loads(pickle.dumps(llava))
    assert twin == llava == copy.deepcopy(llava)
    with pytest.raises(dataclasses.FrozenInstanceError):
        llava.model = "other"


def test_dump_writes_graphs_and_report(llava, tmp_path):
    files = llava.dump(tmp_path / "new" / "folder")
    names = {file.name for file in files}
    # Which one it is depends on how many graphs the vision encoder makes.
    number = next(g.index for g in llava.graphs if g.phase == "prefill" and g.decoder_layers)
    graph = f"graph_{number:03}_prefill"
    assert {"report.json", "report.txt", f"{graph}_before.py", f"{graph}_after.py"} <= names
    assert len(names) == 2 + 2 * len(llava.graphs)
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    assert json.loads(texts["report.json"]) == llava.to_dict()
    assert "lazy (anchor 1)" in texts["report.txt"]
    before, after = texts[f"{graph}_before.py"], texts[f"{graph}_after.py"]
    assert before.count("linear(") - after.count("linear(") == 2 * len(LAZY)
    assert llava.dump(tmp_path / "new" / "folder") == files


def test_dump_needs_the_graphs(refusing, tmp_path):
    with pytest.raises(OptionError, match=r"the graphs were not kept\. Fix: run explain\(\.\.\., keep_graphs=True\)"):
        refusing.dump(tmp_path)
    assert not list(tmp_path.iterdir())


def test_dump_into_a_file(llava, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write to") as caught:
        llava.dump(tmp_path / "file")
    assert caught.value.remedy
