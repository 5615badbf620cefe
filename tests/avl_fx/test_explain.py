"""`explain` on real models: what it finds, and that it leaves no trace."""

import copy
import logging

import numpy
import pytest
import torch
from torch import nn
from transformers import DynamicCache

import avl_fx
from avl_fx._compat import cache_argument
from avl_fx._words import kib
from avl_fx.errors import AvlError, CacheStateError, CaptureError, OptionError, PlanMismatchError, UnsupportedPlanError
from avl_fx.record import recording
from avl_fx.regions import compiled_plan
from tests.avl_fx._explained import (
    BLOCK,
    LAZY,
    TOKENS,
    Tiny,
    encodes_images_ahead,
    explained,
    tiny,
    tiny_inputs,
    zoo_model,
)
from tests.zoo import get

CASES = [
    ("llava", "torch.compile"),
    pytest.param("qwen2_5_vl", "avl_fx.compile", marks=pytest.mark.matrix),
    ("plain_lvlm", "torch.compile"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def traces(model: nn.Module) -> list:
    """Every attribute of every module by identity, and what its containers hold."""
    found = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inside = None
            if isinstance(value, dict):
                inside = [(k, id(v)) for k, v in value.items()]
            elif isinstance(value, list | set):
                inside = [id(v) for v in value]
            found.append((name, key, id(value), inside))
    return found


# ---- what it finds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "door"), CASES)
def test_decoder_sites_are_the_layers(name, door):
    zoo, report = get(name), explained(name, door)
    assert report.decoder.expected == zoo.decoder_layers
    for phase in ("prefill", "decode"):
        assert report.decoder.seen[phase] == tuple(range(zoo.decoder_layers))
        assert report.decoder.graphs[phase] == 1
        sites = [s for s in report.sites if s.role == "decoder" and phase in s.phases]
        assert {s.tower for s in sites} == {zoo.decoder_prefix}
        for site in sites:
            assert zoo_model(name).get_submodule(site.module_path).__class__.__name__ == site.module_class
            assert (site.heads, site.kv_heads, site.head_dim) == (zoo.heads, zoo.kv_heads, zoo.head_dim)
            assert site.kind == zoo.attention_kinds[site.layer]


@pytest.mark.parametrize(("name", "door"), CASES)
def test_lazy_layers_are_marked_and_their_projections_gone(name, door):
    report = explained(name, door)
    actions = {s.layer: s.action for s in report.sites if s.role == "decoder"}
    assert actions == {0: "dense", BLOCK[0]: "anchor", **dict.fromkeys(LAZY, f"lazy (anchor {BLOCK[0]})")}
    for graph in report.graphs:
        saved = 2 * len(LAZY) if graph.decoder_layers else 0
        assert graph.linears_before - graph.linears_after == saved
        assert graph.failure is None
    assert not report.refused
    assert report.stopped is None


@pytest.mark.parametrize(("name", "door"), CASES)
def test_visual_spans_are_the_images(name, door):
    zoo, model, report = get(name), zoo_model(name), explained(name, door)
    expected = zoo.visual_positions(model, zoo.inputs(model, 2))
    found = torch.zeros_like(expected)
    for row, spans in enumerate(report.visual):
        for start, length in spans:
            assert not found[row, start - 1]  # runs are as long as they can be
            found[row, start : start + length] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "door"), CASES)
def test_forwards_are_one_prefill_and_decode_steps(name, door):
    report = explained(name, door)
    assert [f.phase for f in report.forwards] == ["prefill"] + ["decode"] * (TOKENS - 1)
    for graph in report.graphs:
        assert graph.calls == {
            phase: n
            for phase in ("prefill", "decode")
            if (n := sum(f.graphs.get(graph.index, 0) for f in report.forwards if f.phase == phase))
        }
    assert report.forwards[0].captured
    assert [i for f in report.forwards for i in f.captured] == [g.index for g in report.graphs]
    assert 0 < report.pass_seconds < report.capture_seconds <= report.seconds
    assert 0 < report.pass_share < 1


def test_vision_towers():
    encoders = [t for t in explained("qwen2_5_vl", "avl_fx.compile").towers if t.role == "encoder"]
    assert [(t.path, t.depth, t.layers) for t in encoders] == [("model.visual.blocks", 2, (0, 1))]
    assert encoders[0].sites_per_layer > 1  # an attention call for each window
    encoders = [t for t in explained("plain_lvlm").towers if t.role == "encoder"]
    assert [(t.path, t.layers, t.sites_per_layer) for t in encoders] == [("tower", (0, 1), 1)]


def test_generate_may_run_the_vision_tower_outside_of_forward():
    report, ahead = explained("llava"), encodes_images_ahead(zoo_model("llava"))
    assert [t.role for t in report.towers] == (["decoder"] if ahead else ["encoder", "decoder"])
    assert any("model.vision_tower ran eagerly" in line for line in report.advice) == ahead
    assert not any("vision" in line for line in explained("qwen2_5_vl", "avl_fx.compile").advice)


def test_a_decoder_in_pieces_is_seen_whole_and_named():
    report = explained("qwen3_vl", new_tokens=1)
    layers = get("qwen3_vl").decoder_layers
    assert report.decoder.seen == {"prefill": tuple(range(layers))}
    assert report.decoder.graphs == {"prefill": layers}
    assert {s.tower for s in report.sites if s.role == "decoder"} == {get("qwen3_vl").decoder_prefix}
    assert {s.layer for s in report.refused} == set(LAZY)
    advice = "\n".join(report.advice)
    assert f"{layers} decoder layers expected, {layers} graphs hold one each" in advice
    assert "avl_fx.compile(model, plan=...)" in advice
    assert "after 8 graphs" in advice
    assert report.breaks


def test_generate_arguments_are_passed_through():
    report = explained("llava", "avl_fx.compile", lazy=False, new_tokens=2, cache_implementation="static")
    assert {s.cache for s in report.sites if s.role == "decoder"} == {"static"}
    assert report.plan == {"version": 1}


def test_model_without_generate_is_called_once():
    report = avl_fx.explain(tiny(), **tiny_inputs())
    assert [f.phase for f in report.forwards] == ["prefill"]
    assert report.decoder.expected == 2
    assert report.decoder.seen == {"prefill": (0, 1)}
    assert [s.module_path for s in report.sites] == ["layers.0", "layers.1"]
    assert report.kv is None
    assert report.visual is None
    assert any("Only one forward ran" in line for line in report.advice)
    assert any("No visual positions" in line for line in report.advice)
    assert not any("vision encoder" in line for line in report.advice)


def test_refused_sites_and_training_mode_are_reported():
    report = avl_fx.explain(tiny(rank=3).train(), **tiny_inputs())
    assert {s.reason for s in report.refused} == {"query, key or value is not 4-dimensional"}
    assert any("is not 4-dimensional" in line for line in report.advice)
    assert any("training mode" in line for line in report.advice)


def sizes_vary(model: nn.Module, *lengths: int) -> list[bool]:
    """For each length, whether the graph that plain torch.compile captures has a symbolic size."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(any(isinstance(x, torch.SymInt | int) for x in example_inputs))
        return gm.forward

    for length in lengths:
        torch.compile(model.forward, backend=backend)(**tiny_inputs(length))
    return graphs


def test_every_run_starts_afresh():
    """Neither sizes nor code of an earlier run are reused: the same run gives the same graphs."""
    torch._dynamo.reset()
    model = tiny()
    assert sizes_vary(model, 4, 9) == [False, True]
    reports = [avl_fx.explain(model, **tiny_inputs(length)) for length in (5, 7, 5)]
    assert [len(r.graphs) for r in reports] == [1, 1, 1]
    assert [r.sites[0].keys for r in reports] == [5, 7, 5]
    assert sizes_vary(model, 11) == [True]  # what Dynamo knew before, it knows again


def test_later_runs_start_afresh():
    """Nor does Dynamo remember what explain showed it."""
    torch._dynamo.reset()
    model = tiny()
    for length in (5, 7):
        avl_fx.explain(model, **tiny_inputs(length))
    assert sizes_vary(model, 9) == [False]


@pytest.mark.parametrize("door", ["torch.compile", "avl_fx.compile"])
def test_code_of_an_equal_compilation_is_not_reused(door):
    """Dynamo would hand out the user's code, since backend and options are equal; nothing would be recorded."""
    torch._dynamo.reset()
    model, inputs = tiny(), tiny_inputs()
    options = {"plan": avl_fx.Plan.identity(), "compiler": "eager"}
    model.forward = torch.compile(model.forward, backend=avl_fx.avl_backend, options=options)
    with torch.no_grad():
        model(**inputs)
    assert len(avl_fx.explain(model, front_door=door, **inputs).graphs) == 1
    del model.forward
    avl_fx.compile(model, options=options)
    with torch.no_grad():
        model(**inputs)
    assert len(avl_fx.explain(model, front_door=door, **inputs).graphs) == 1


def test_compilers():
    model, inputs = tiny(), tiny_inputs()
    for compiler in ("eager", "aot_eager"):
        assert avl_fx.explain(model, compiler=compiler, **inputs).compiler == compiler


def test_error_of_a_step_ends_up_in_the_report():
    def run(model, **inputs):
        model(**inputs)
        raise CacheStateError("keys are gone", field="cache", remedy="start again")

    report = avl_fx.explain(tiny(), run=run, **tiny_inputs())
    assert report.stopped == "cache: keys are gone. Fix: start again."
    assert report.sites
    assert "The run stopped early" in str(report)


def test_failure_of_a_pass_is_reported_not_logged(monkeypatch, caplog):
    def boom(gm, ctx):
        raise RuntimeError("boom")

    monkeypatch.setattr("avl_fx.backend.run_stages", boom)
    report = avl_fx.explain(tiny(), **tiny_inputs())
    assert [g.failure for g in report.graphs] == ["RuntimeError: boom"]
    assert report.advice[0].startswith("A pass failed on graph 0")
    assert "compiled untouched: RuntimeError: boom" in report.render(width=160)
    assert not [r for r in caplog.records if r.name == "avl_fx"]
    assert logging.getLogger("avl_fx").level == logging.NOTSET
    with caplog.at_level(logging.INFO, "avl_fx"):
        avl_fx.explain(tiny(), **tiny_inputs())
    assert [r for r in caplog.records if r.name == "avl_fx"]


# ---- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("llava", marks=pytest.mark.matrix), "qwen2_5_vl"])
def test_model_is_left_as_it_was(name):
    """Transformers installs hooks and keeps positions on first use; even those go."""
    zoo = get(name)
    model = zoo.make()
    inputs = zoo.inputs(model)
    given, before = copy.deepcopy(inputs), traces(model)
    generator = torch.get_rng_state()
    avl_fx.explain(model, avl_fx.Plan.lazy([BLOCK]), front_door="avl_fx.compile", new_tokens=1, **inputs)
    assert traces(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(given[key], inputs[key]) for key in given)


@pytest.mark.parametrize("door", ["torch.compile", "avl_fx.compile"])
def test_model_is_left_as_it_was_when_it_raises(door):
    class Failing(Tiny):
        def forward(self, x):
            self.seen.append(1)
            super().forward(x)
            torch.rand(1)
            raise ValueError("no")

    model = Failing().train()
    model.layers[1].eval()
    model.register_forward_hook(lambda *args: None)
    before, generator = traces(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="no"):
        avl_fx.explain(model, front_door=door, **tiny_inputs())
    assert traces(model) == before
    assert model.training
    assert not model.layers[1].training
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("door", ["torch.compile", "avl_fx.compile"])
@pytest.mark.parametrize("how", ["forward", "module.compile", "torch.compile", "avl_fx.compile"])
def test_compiled_model_keeps_its_code(how, door):
    model, inputs, graphs = tiny(), tiny_inputs(), []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    called = model
    if how == "forward":
        model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
    elif how == "module.compile":
        model.compile(backend=backend, dynamic=True)
    elif how == "torch.compile":
        called = torch.compile(model, backend=backend, dynamic=True)
    else:
        avl_fx.compile(model, avl_fx.Plan.lazy([(0, 1)], description="mine"), options={"compiler": "eager"})
    with recording() as recorder:
        expected = called(**inputs)
        before, compiled = traces(model), len(graphs) + len(recorder.graphs)
        report = avl_fx.explain(called, front_door=door, **inputs)
        assert len(report.graphs) == 1
        # Its own plan and settings, not those of the model.
        assert {(s.action, s.keys) for s in report.sites} == {("dense", 5)}
        assert report.model == "Tiny"
        assert traces(model) == before
        assert torch.equal(called(**inputs), expected)
        assert len(graphs) + len(recorder.graphs) == compiled == 1
    if how == "avl_fx.compile":
        assert compiled_plan(model).description == "mine"
        avl_fx.uncompile(model)
        assert compiled_plan(model) is None
    torch._dynamo.reset()


class Broken(nn.Module):
    """Its layers are functions of their own to Dynamo, behind graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return self.inner(x)


@pytest.mark.parametrize("make", [tiny, Broken])
def test_explain_uses_up_no_recompile_limit(make):
    model, inputs = make(), tiny_inputs()
    for _ in range(10):
        avl_fx.explain(model, **inputs)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        torch.compile(model.forward, backend="eager")(**inputs)
    torch._dynamo.reset()


@pytest.mark.parametrize("door", ["torch.compile", "avl_fx.compile"])
@pytest.mark.parametrize("make", [tiny, Broken])
def test_explain_sees_a_model_whose_recompile_limit_is_used_up(make, door):
    model = make()
    with torch._dynamo.config.patch(recompile_limit=1):
        for length in (3, 4):
            torch.compile(model, backend="eager", dynamic=False)(**tiny_inputs(length))
        assert len(avl_fx.explain(model, front_door=door, **tiny_inputs()).graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("name", sorted({"past_key_values", cache_argument()}))
def test_a_cache_that_is_passed_in_stays_empty(name):
    zoo, model = get("llava"), zoo_model("llava")
    cache = DynamicCache(config=model.config)
    report = avl_fx.explain(model, new_tokens=1, **{name: cache}, **zoo.inputs(model))
    assert report.kv.length > 0
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("door", ["torch.compile", pytest.param("avl_fx.compile", marks=pytest.mark.matrix)])
def test_a_compact_cache_is_counted_as_it_is(door):
    plan = avl_fx.Plan.avl(core=0.3, secondary=0.5, refresh=3, text=None)
    zoo, model = get("llava"), zoo_model("llava")
    cache, inputs = avl_fx.AVLCache(plan, model.config), zoo.inputs(model, 2)
    report = avl_fx.explain(model, plan, front_door=door, new_tokens=TOKENS, past_key_values=cache, **inputs)
    assert cache.get_seq_length() == 0
    counts = zip(inputs["attention_mask"].sum(1).tolist(), zoo.visual_positions(model, inputs).sum(1), strict=True)
    rows = max(real - int(images) + int(0.5 * images) for real, images in counts) + TOKENS - 1
    kv = report.kv
    assert (kv.kind, kv.measured, kv.length) == ("compact", True, inputs["input_ids"].shape[1] + TOKENS - 1)
    assert kv.plan * kv.length == kv.dense * rows
    assert kv.spare_bytes >= 0
    assert "KV cache (compact" in str(report)
    assert "nothing is lost" not in str(report), "what is not stored is lost to other plans"


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["vla", "vla_scores"])
def test_visual_keys_that_lazy_layers_do_not_need_are_named(mode):
    """So many bytes less are stored by an `AVLCache`."""
    plan = avl_fx.Plan.lazy([(1, 3)], mode)
    zoo, model = get("llava"), zoo_model("llava")
    settings = {"front_door": "avl_fx.compile", "new_tokens": TOKENS, **zoo.inputs(model)}
    stock = avl_fx.explain(model, plan, **settings)
    compact = avl_fx.explain(model, plan, past_key_values=avl_fx.AVLCache(plan, model.config), **settings)
    assert stock.kv.plan - stock.kv.spared_bytes == compact.kv.plan < stock.kv.plan
    words = f"{kib(stock.kv.spared_bytes)} are visual keys of lazy layers, which an AVLCache does not store"
    assert words in " ".join(str(stock).split())
    assert compact.kv.spared_bytes == 0
    assert "visual keys of lazy layers" not in str(compact)


# ---- errors ----------------------------------------------------------------------------------------------------------


def fails(kind: type[AvlError], field: str, *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        avl_fx.explain(*args, **kwargs)
    assert caught.value.field == field
    assert caught.value.remedy
    return str(caught.value)


def test_errors_of_the_model():
    for wrong in ("llava", None, Tiny, tiny().forward):
        assert "a torch.nn.Module can be explained" in fails(CaptureError, "model", wrong, **tiny_inputs())


def test_errors_of_the_inputs():
    assert "none were given" in fails(CaptureError, "inputs", tiny())
    assert "no tensor among them" in fails(CaptureError, "inputs", tiny(), use_cache=True)
    assert "must be a tensor, got list" in fails(CaptureError, "x", tiny(), x=[[1.0, 2.0]])
    assert "must be a tensor, got ndarray" in fails(CaptureError, "pixels", tiny(), pixels=numpy.ones(3))


def test_errors_of_the_settings():
    model, inputs = tiny(), tiny_inputs()
    text = fails(OptionError, "front_door", model, front_door="torch_compile", **inputs)
    assert "did you mean 'torch.compile'?" in text
    fails(OptionError, "front_door", model, front_door=None, **inputs)
    fails(OptionError, "compiler", model, compiler="tvm", **inputs)
    for wrong in (0, 1.5, True, "3"):
        fails(OptionError, "new_tokens", model, new_tokens=wrong, **inputs)


def test_errors_of_the_plan():
    inputs = get("llava").inputs(zoo_model("llava"))
    fails(UnsupportedPlanError, "prefill", tiny(), {"prefill": {"keep": 0.5}}, **tiny_inputs())
    fails(PlanMismatchError, "lazy.blocks[0]", zoo_model("llava"), avl_fx.Plan.lazy([(1, 4)]), **inputs)
    fails(PlanMismatchError, "lazy.blocks[0]", tiny(), avl_fx.Plan.lazy([(1, 4)]), **tiny_inputs())


def test_own_loop_is_called_with_model_and_inputs():
    seen = {}

    def run(model, **inputs):
        seen.update(model=model, **inputs)
        model(**inputs)

    model, inputs = tiny(), tiny_inputs()
    avl_fx.explain(model, run=run, **inputs)
    assert seen == {"model": model, **inputs}
    assert explained("plain_lvlm").decoder.seen.keys() == {"prefill", "decode"}


def test_what_a_static_cache_keeps_for_nothing():
    """Buffers of keys that lazy layers neither write nor read: 2 of 4 layers, and no other bytes are saved."""
    report = explained("llava", "avl_fx.compile", new_tokens=2, cache_implementation="static")
    (keys,) = {s.keys for s in report.sites if s.role == "decoder" and s.cache == "static"}
    of_a_layer = 2 * 2 * keys * 16 * 4  # batch, KV heads, positions, head dim, float32
    assert report.kv.empty_bytes == 2 * of_a_layer
    assert report.kv.plan == report.kv.dense == 4 * 2 * of_a_layer
    words = " ".join(str(report).split())
    assert f"keeps its buffers ({kib(2 * of_a_layer)}, which an AVLCache does not take)" in words
    assert explained("llava").kv.empty_bytes == 0
    assert explained("llava", lazy=False).kv.empty_bytes == 0
