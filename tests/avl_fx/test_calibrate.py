"""`calibrate`: what it measures against an eager run, what it chooses, how it goes on, what it refuses."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import avl_fx
from avl_fx._findings import Findings, fingerprint, load, save
from avl_fx._targets import Target
from avl_fx.calibrate import calibrated
from avl_fx.calibration_report import CalibrationReport, Ratios
from avl_fx.errors import CalibrationError, OptionError
from avl_fx.modality import given
from avl_fx.passes.context import ObservedLayer
from avl_fx.plan import Plan
from avl_fx.similarity import MASSES, Statistics, concentration, divergences, share_holding
from tests.avl_fx._explained import Tiny, spans, tiny, tiny_inputs
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, through
from tests.oracle._interface import attend, attention_weights, in_charge
from tests.zoo import ZooModel, get
from tests.zoo._run import prefill

pytestmark = pytest.mark.usefixtures("one_thread")

INF = float("inf")
LN2 = 0.6931471805599453


# ---- statistics --------------------------------------------------------------------------------------------------


def rows(*layers: list[list[float]]) -> dict[int, Tensor]:
    """Layers of one sample: a distribution a head."""
    return {n: torch.tensor([layer]) for n, layer in enumerate(layers)}


def test_divergence_by_hand() -> None:
    one, other, both = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    found = divergences(rows([one, one], [other, one], [both, both]), (), 3)[0]
    assert found[0, 1].item() == pytest.approx(LN2 / 2)  # of one head ln 2, the most there is; of the other nothing
    # The mean is (3/4, 1/4).
    assert found[0, 2].item() == pytest.approx((math.log(4 / 3) + math.log(2 / 3) / 2 + LN2 / 2) / 2)
    assert found.equal(found.T)
    assert not found.diagonal().any()


def test_layers_that_may_not_share_or_were_not_seen_are_infinitely_far() -> None:
    given = rows([[0.5, 0.5]], [[0.4, 0.6]], [[0.3, 0.7]], [[0.3, 0.3, 0.4]])
    found = divergences(given, {(0, 2)}, 5)[0]
    assert [found[0, n].isfinite().item() for n in range(5)] == [True, True, False, False, False]
    assert found[1, 2].isfinite()
    assert found[4, 4] == 0


def test_how_many_keys_hold_a_mass() -> None:
    assert share_holding(torch.tensor([0.1, 0.5, 0.3, 0.1], dtype=torch.float64)).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert share_holding(torch.ones(10, dtype=torch.float64)).tolist() == [0.5, 0.8, 0.9, 1.0]


def test_concentration_leaves_out_samples_without_visual_keys_and_without_attention_to_them() -> None:
    row = torch.tensor([[[0.5, 0.4, 0.1, 0.0]], [[0.25, 0.25, 0.25, 0.25]], [[1.0, 0.0, 0.0, 0.0]]])
    visual = spans(".##.", "....", "..##")
    mass, spread = concentration(row, visual)
    assert mass.tolist() == [pytest.approx(0.5), 0.0]
    assert spread.tolist() == [[0.5, 0.5, 1.0, 1.0]]


def test_sums_of_two_sittings_are_those_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    made = [{n: torch.rand(2, 3, 7, generator=generator).softmax(-1) for n in range(3)} for _ in range(4)]
    visual = spans(".###...", "..#####")
    whole = Statistics.empty(3)
    for layers in made:
        whole.add(layers, (), visual, 7)
    half = Statistics.empty(3)
    for layers in made[:2]:
        half.add(layers, (), visual, 7)
    half = Statistics.of(half.samples, {name: tensor.clone() for name, tensor in half.tensors().items()})
    for layers in made[2:]:
        half.add(layers, (), visual, 7)
    assert half.samples == whole.samples == 8
    assert all(tensor.equal(half.tensors()[name]) for name, tensor in whole.tensors().items())


# ---- against an eager run ----------------------------------------------------------------------------------------


class Watching:
    """Attends as the model does and keeps every layer's whole softmax matrix."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, causal: bool) -> Tensor:
        self.weights[layer] = attention_weights(q, k, mask, scale, causal)
        return attend(q, k, v, mask, scale, causal)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """By its definition, ``(KL(p | m) + KL(q | m)) / 2``, float64, over the last dimension."""
    p, q = p.double(), q.double()
    m = (p + q) / 2

    def kl(a: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / m).log(), 0.0).sum(-1)

    return (kl(p) + kl(q)) / 2


@cache
def model_of(name: str) -> nn.Module:
    return get(name).make()


SIZES = {"llava": (1, 2, 3), "qwen2_5_vl": (2,), "gemma3": (1, 2)}
"""Rows of each batch: other rows make other lengths and other padding."""


def batches_of(zoo: ZooModel, model: nn.Module) -> list[dict[str, Tensor]]:
    return [zoo.inputs(model, rows, seed=n) for n, rows in enumerate(SIZES[zoo.name])]


def eager(zoo: ZooModel, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean divergences of all pairs of layers, and each layer's mean mass on visual keys."""
    layers, samples, seen = zoo.decoder_layers, 0, 0
    matrix, mass = torch.zeros(layers, layers, dtype=torch.float64), torch.zeros(layers, dtype=torch.float64)
    for inputs in batches:
        watching = Watching()
        with in_charge(model, list(zoo.layers(model)), watching):
            prefill(model, inputs)
        visual = zoo.visual_positions(model, inputs)
        for row in range(len(visual)):
            last = [watching.weights[n][row, :, -1] for n in range(layers)]  # padding stands in front
            matrix += torch.stack([torch.stack([jensen_shannon(p, q).mean() for q in last]) for p in last])
            samples += 1
            if visual[row].any():
                mass += torch.stack([p.mean(0)[visual[row]].sum() for p in last]).double()
                seen += 1
    return matrix / samples, mass / seen


@pytest.mark.parametrize("name", rest_in_matrix([*SIZES], ["gemma3"]))
def test_divergences_and_masses_are_those_of_an_eager_run(name: str) -> None:
    zoo, model = get(name), model_of(name)
    found = report_of(name)
    matrix, mass = eager(zoo, model, batches_of(zoo, model))
    for a, kind in enumerate(zoo.attention_kinds):
        for b, other in enumerate(zoo.attention_kinds):
            if kind == other:
                assert found.matrix[a][b] == pytest.approx(matrix[a, b].item(), abs=1e-5)
            else:
                assert found.matrix[a][b] == INF
    assert [layer.visual_mass for layer in found.layers] == pytest.approx(mass.tolist(), abs=1e-5)
    assert (found.batches, found.samples) == (len(SIZES[name]), sum(SIZES[name]))
    assert [layer.kind for layer in found.layers] == list(zoo.attention_kinds)


@cache
def report_of(name: str, share: float = 0.25) -> CalibrationReport:
    zoo, model = get(name), model_of(name)
    return calibrated(model, batches_of(zoo, model), {"lazy_share": share}, vision=True)


@pytest.mark.parametrize("name", rest_in_matrix(["llava", "gemma3"], ["gemma3"]))
def test_the_cheapest_layer_is_lazy_and_the_savings_are_what_explain_counts(name: str) -> None:
    zoo, model, found = get(name), model_of(name), report_of(name)
    pairs = {n: found.matrix[n - 1][n] for n in range(1, 4)}
    lazy = min(pairs, key=pairs.__getitem__)
    assert found.blocks == ((lazy - 1, lazy),)
    assert found.cost == pytest.approx(pairs[lazy])
    assert found.plan.lazy_policy.blocks == found.blocks
    plan = Plan.lazy(found.blocks)
    explained = avl_fx.explain(model, plan, front_door="avl_fx.compile", new_tokens=1, **zoo.inputs(model, 2))
    assert {s.layer for s in explained.sites if s.action.startswith("lazy")} == {lazy}
    (graph,) = [g for g in explained.graphs if g.decoder_layers]
    assert (graph.linears_before, graph.linears_after) == (found.savings.linears_before, found.savings.linears_after)
    assert found.savings.kv_bytes_before == 4 * 2 * (16 + 16) * 4  # layers, KV heads, key and value, float32
    assert found.savings.kv_share == pytest.approx(1 / 8)


def test_ratios_come_from_layers_that_see_all_keys() -> None:
    found = report_of("gemma3")
    full = [layer for layer in found.layers if layer.kind == "full"]
    assert [layer.ratios is not None for layer in found.layers] == [False, False, True, True]
    mean = {m: sum(layer.visual_spread[m] for layer in full) / 2 for m in ("0.8", "0.95")}
    assert 0 <= found.ratios.core - mean["0.8"] < 0.01
    assert 0 <= found.ratios.secondary - mean["0.95"] < 0.01
    policy = found.plan.vision_policy
    assert (policy.core, policy.secondary) == (found.ratios.core, found.ratios.secondary)


def test_ratios_are_rounded_up() -> None:
    assert Ratios.of((0.1, 0.301, 0.4, 0.5)) == Ratios(0.31, 0.5)
    assert Ratios.of((0.1, 0.3, 0.4, 1.0)) == Ratios(0.3, 1.0)
    assert MASSES == (0.5, 0.8, 0.9, 0.95)


# ---- planted similarity ------------------------------------------------------------------------------------------


@torch.no_grad()
def plant(zoo: ZooModel, model: nn.Module, first: int, last: int) -> None:
    """Let layers ``first .. last`` attend exactly alike: the same projections, on the same hidden states."""
    layers = zoo.layers(model)
    source = dict(layers[first].named_parameters())
    for layer in range(first, last + 1):
        for name, parameter in layers[layer].named_parameters():
            if "self_attn" in name or name.startswith("input_layernorm"):
                parameter.copy_(source[name])
    for layer in range(first, last):
        # What a layer adds is what tells the next one's input from its own.
        layers[layer].self_attn.o_proj.weight.zero_()
        layers[layer].mlp.down_proj.weight.zero_()


TARGETS = ({"epsilon": 1e-4}, {"lazy_share": 0.5}, {"kv_saving": 0.25}, {"max_divergence": 1e-3})


def test_every_target_finds_layers_that_attend_alike(tmp_path: Path) -> None:
    zoo = get("llava")
    model = zoo.make()
    plant(zoo, model, 1, 3)
    batches = batches_of(zoo, model)[:2]
    saved = tmp_path / "state"  # one run answers all
    plans = [avl_fx.calibrate(model, batches, state=saved, **target) for target in TARGETS]
    assert {plan.lazy_policy.blocks for plan in plans} == {((1, 3),)}
    assert all(plan.num_layers == 4 for plan in plans)
    # They do attend alike: the plan changes nothing.
    expected = prefill(model, batches[1])
    with through("avl_fx.compile", model, plan=plans[0], compiler="eager") as recorder:
        actual = prefill(model, batches[1])
    assert sum(s.action.startswith("lazy") for g in recorder.graphs for s in g.sites) == 2
    real = batches[1]["attention_mask"].bool()
    assert (actual - expected)[real].abs().max() < FLOAT32_TOLERANCE


def test_layers_that_attend_alike_in_a_model_with_positions_of_its_own() -> None:
    zoo = get("qwen2_5_vl")
    model = zoo.make()
    plant(zoo, model, 0, 2)
    assert calibrated(model, [zoo.inputs(model, 2)], {"epsilon": 1e-4}).blocks == ((0, 2),)


def test_layers_of_another_kind_share_no_block_however_alike(tmp_path: Path) -> None:
    zoo = get("gemma3")
    model, saved = zoo.make(), tmp_path / "state"
    plant(zoo, model, 2, 3)
    batches = [zoo.inputs(model, 2)]
    assert calibrated(model, batches, {"epsilon": 1e-4}, state=saved).blocks == ((2, 3),)
    everything = calibrated(model, batches, {"epsilon": 10}, state=saved)
    assert everything.blocks == ((0, 1), (2, 3))
    assert "full, anchor sliding" in everything.apart["1-2"]
    with pytest.raises(CalibrationError, match=r"lazy_share: 0.75 cannot be reached: at most 2 of 4 layers \(0.500\)"):
        avl_fx.calibrate(model, batches, lazy_share=0.75, state=saved)


# ---- a model without a config ------------------------------------------------------------------------------------


def told(batches: Iterable[dict[str, Tensor]], *drawn: str) -> Iterator[dict[str, Tensor]]:
    """The batches, each inside `modality_ids`."""
    for batch in batches:
        with avl_fx.modality_ids(spans(*(drawn or (".##..", "..##.")))):
            yield batch


def tiny_batches(count: int) -> list[dict[str, Tensor]]:
    return [{"x": tiny_inputs()["x"].sin() * (n + 1)} for n in range(count)]


def tiny_report(count: int = 2, model: nn.Module | None = None, **settings: Any) -> CalibrationReport:
    return calibrated(model or tiny(), told(tiny_batches(count)), {"epsilon": 1.0}, **settings)


def test_a_generator_may_name_the_visual_positions() -> None:
    found = tiny_report()
    assert (found.batches, found.samples, found.blocks) == (2, 4, ((0, 1),))
    assert found.layers[0].visual_mass is not None


def test_a_generator_that_is_left_early_takes_nothing_back_later() -> None:
    batches = told(tiny_batches(3))
    calibrated(tiny(), batches, {"epsilon": 1.0}, limit=1)
    assert given() is None
    with avl_fx.modality_ids(spans("#")):
        batches.close()
        assert given() is not None


def test_limit_and_mode() -> None:
    drawn: list[int] = []

    def endless() -> Iterator[dict[str, Tensor]]:
        for batch in tiny_batches(100):
            drawn.append(1)
            yield batch

    found = calibrated(tiny(), told(endless()), {"epsilon": 1.0}, limit=3, mode="vla")
    assert (found.batches, len(drawn)) == (3, 3)
    assert found.plan.lazy_policy.mode == "vla"
    assert (found.savings.lazy_layers, found.savings.kv_share) == (1, 0)
    assert found.savings.linears_after == found.savings.linears_before


def test_nothing_under_epsilon_is_the_identity_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "avl_fx"):
        plan = avl_fx.calibrate(tiny(), told(tiny_batches(1)), epsilon=0)
    assert plan.is_identity
    assert plan.num_layers == 2
    assert re.search(r"no layer is lazy under epsilon 0: neighbouring layers differ by 0\.0\d+ nats", caplog.text)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny().train()
    avl_fx.compile(model, options={"compiler": "eager"})
    compiled, hooks, state = model._compiled_call_impl, dict(model._forward_hooks), torch.get_rng_state()
    tiny_report(model=model)
    with pytest.raises(CalibrationError, match="NaN"):
        avl_fx.calibrate(model, told([{"x": torch.full((2, 5, 16), torch.nan)}]), epsilon=1.0)
    assert model._compiled_call_impl is compiled
    assert dict(model._forward_hooks) == hooks
    assert model.training
    assert "forward" not in vars(model)
    assert torch.get_rng_state().equal(state)
    avl_fx.uncompile(model)


def test_padding_rows_are_no_samples() -> None:
    zoo, model = get("llava"), model_of("llava")
    inputs = zoo.inputs(model, 2)
    alone = calibrated(model, [zoo.inputs(model, 1, first=1)], {"epsilon": 1.0})
    inputs["attention_mask"][0] = 0
    padded = calibrated(model, [inputs], {"epsilon": 1.0})
    assert (alone.samples, padded.samples) == (1, 1)
    assert padded.matrix[0] == pytest.approx(alone.matrix[0], abs=1e-5)


# ---- going on after a break ----------------------------------------------------------------------------------------


def breaking(batches: list[dict[str, Tensor]], after: int) -> Iterator[dict[str, Tensor]]:
    yield from batches[:after]
    raise ConnectionError("the images are gone")


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    zoo, model = get("llava"), model_of("llava")
    batches, saved = batches_of(zoo, model), tmp_path / "folder" / "state"
    with pytest.raises(ConnectionError):
        avl_fx.calibrate(model, breaking(batches, 1), lazy_share=0.25, state=saved)
    mark = fingerprint(model, "eager")
    assert load(saved, mark).batches == 1
    actual = calibrated(model, batches, {"lazy_share": 0.25}, vision=True, state=saved)
    # Floats survive JSON to the last bit.
    assert actual.to_json() == report_of("llava").to_json()
    assert load(saved, mark).batches == 3
    assert [p.name for p in saved.parent.iterdir()] == ["state"]


def test_a_finished_state_runs_nothing_again(tmp_path: Path) -> None:
    model, saved = tiny(), tmp_path / "state"
    tiny_report(2, model, state=saved)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    tiny_report(2, model, state=saved)
    assert not calls
    tiny_report(3, model, state=saved)
    assert len(calls) == 1


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    model, saved = tiny(), tmp_path / "state"
    tiny_report(2, model, state=saved)
    with torch.no_grad():
        other = tiny()
        other.layers[1].q_proj.weight.mul_(2)
    for wrong, settings in ((other, {}), (Tiny(layers=3), {}), (model, {"compiler": "aot_eager"})):
        with pytest.raises(CalibrationError, match=r"state: .* was saved by a run with another model"):
            tiny_report(2, wrong, state=saved, **settings)
    with pytest.raises(CalibrationError, match="state: the state holds 2 batches, there are only 1"):
        tiny_report(1, model, state=saved)
    with pytest.raises(CalibrationError, match="limit: the state holds 2 batches, more than limit = 1"):
        tiny_report(2, model, state=saved, limit=1)
    with pytest.raises(CalibrationError, match="is a directory"):
        tiny_report(2, model, state=tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CalibrationError, match="is no state of a calibration"):
        tiny_report(2, model, state=tmp_path / "text")
    with pytest.raises(CalibrationError, match="state: cannot write"):
        tiny_report(1, model, state=tmp_path / "text" / "state")


def test_a_write_that_fails_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, saved = Findings(Statistics.empty(2), batches=1), tmp_path / "state"
    found.layers[0] = ObservedLayer(0, "full", 4, 2, 16, 16, "float32", 2)
    found.apart[0, 1] = "why"
    save(found, saved, "mark")
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CalibrationError, match="No space left"):
        save(found, saved, "mark")
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert saved.read_bytes() == before
    again = load(saved, "mark")
    assert (again.batches, again.layers, again.apart) == (1, found.layers, found.apart)


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_report_folder(tmp_path: Path) -> None:
    found = report_of("gemma3")
    found.dump(tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    assert sorted(p.name for p in folder.iterdir()) == ["plan.json", "report.html", "report.json", "similarity.png"]
    assert Plan.from_json(folder / "plan.json") == found.plan
    data = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["plan"] == json.loads(found.plan.to_json())
    assert data["matrix"][0][2] is None
    assert data["matrix"][0][1] == found.matrix[0][1]
    assert data["savings"]["kv_share"] == pytest.approx(1 / 8)
    assert [layer["role"] for layer in data["layers"]].count("lazy") == 1
    image = (folder / "similarity.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert width > height > 800
    page = (folder / "report.html").read_text()
    assert re.findall(r"(?:src|href)=\"(.{15})", page) == ["data:image/png;"]
    assert not re.search(r"https?://|@import|<script|<link", page)
    for part in ("Gemma3ForConditionalGeneration", "lazy (anchor", "Jensen-Shannon", found.plan.fingerprint()):
        assert part in page


def test_calibrate_writes_it(tmp_path: Path) -> None:
    plan = avl_fx.calibrate(tiny(), told(tiny_batches(1)), epsilon=1.0, report=tmp_path / "out")
    assert Plan.from_json(tmp_path / "out" / "plan.json") == plan


def test_what_the_report_lacks_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Iterator[dict[str, Tensor]]:
        pytest.fail("a batch was drawn")
        yield {}

    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="report: cannot make the folder"):
        avl_fx.calibrate(tiny(), never(), epsilon=1.0, report=tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CalibrationError, match=r"report: .* not installed. Fix: pip install 'avl-fx\[calibrate\]'"):
        avl_fx.calibrate(tiny(), never(), epsilon=1.0, report=tmp_path / "out")


# ---- errors ------------------------------------------------------------------------------------------------------


WRONG_TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "target: one of epsilon, lazy_share, kv_saving, max_divergence has to be given"),
    "two": ({"epsilon": 0.1, "kv_saving": 0.2}, "kv_saving: give one of them, not epsilon and kv_saving"),
    "negative": ({"epsilon": -0.1}, "epsilon: divergences are at least 0, got -0.1"),
    "negative budget": ({"max_divergence": -1}, "max_divergence: divergences are at least 0"),
    "no share": ({"lazy_share": 0}, "lazy_share: a share lies between 0 and 1, got 0"),
    "percent": ({"lazy_share": 45}, "lazy_share: a share lies between 0 and 1, got 45"),
    "everything": ({"kv_saving": 1.0}, "kv_saving: a share lies between 0 and 1, got 1"),
    "nan": ({"epsilon": float("nan")}, "epsilon: must be a number, got float nan"),
    "text": ({"epsilon": "0.1"}, "epsilon: must be a number, got str '0.1'"),
    "bool": ({"lazy_share": True}, "lazy_share: must be a number, got bool True"),
}


@pytest.mark.parametrize("case", WRONG_TARGETS)
def test_wrong_targets(case: str) -> None:
    settings, message = WRONG_TARGETS[case]
    with pytest.raises(CalibrationError, match=re.escape(message)) as caught:
        avl_fx.calibrate(tiny(), [tiny_inputs()], **settings)
    assert caught.value.remedy


def test_shares_are_reached_and_not_exceeded_by_more_than_a_layer() -> None:
    zeros = [[0.0] * 10 for _ in range(10)]
    for share, lazy in ((0.1, 1), (0.3, 3), (0.45, 5), (0.7, 7), (0.9, 9)):
        blocks = Target("lazy_share", share).blocks(zeros, [1] * 10, [2] * 10)
        assert sum(last - first for first, last in blocks) == lazy
    # A wide layer's keys count for more.
    matrix = [[0.0, 0.1, 9.0, 9.0], [0.1, 0.0, 9.0, 9.0], [9.0, 9.0, 0.0, 0.2], [9.0, 9.0, 0.2, 0.0]]
    keys, both = [64, 64, 64, 192], [128, 128, 128, 384]
    assert Target("kv_saving", 0.05).blocks(matrix, keys, both) == ((0, 1),)
    assert Target("kv_saving", 0.25).blocks(matrix, keys, both) == ((2, 3),)
    with pytest.raises(CalibrationError, match=r"at most \(0.417\) of the KV bytes .* give 0.416 or less"):
        Target("kv_saving", 0.5).blocks(matrix, keys, both)
    apart = [[0.0, INF], [INF, 0.0]]
    with pytest.raises(CalibrationError, match="no two neighbouring layers"):
        Target("lazy_share", 0.5).blocks(apart, [1, 1], [2, 2])


def test_modes_that_inherit_at_visual_positions_leave_windows_alone(tmp_path: Path) -> None:
    zoo, model = get("gemma3"), model_of("gemma3")
    batches, saved = [zoo.inputs(model, 1)], tmp_path / "state"
    assert calibrated(model, batches, {"epsilon": 10}, state=saved).blocks == ((0, 1), (2, 3))
    for mode in ("vla", "vla_scores"):
        found = calibrated(model, batches, {"epsilon": 10}, mode=mode, state=saved)
        assert found.blocks == ((2, 3),)
        assert found.matrix[0][1] < INF
        with pytest.raises(CalibrationError, match=f"kv_saving: what mode '{mode}' saves depends on the prompt"):
            avl_fx.calibrate(model, batches, kv_saving=0.1, mode=mode, state=saved)


WRONG_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no module": ({"model": "llava"}, "model: a torch.nn.Module can be calibrated, not str 'llava'"),
    "one batch": ({"batches": tiny_inputs()}, r"batches: must be an iterable of batches, got dict .* \[batch\]"),
    "a number": ({"batches": 3}, "batches: must be an iterable of batches, got int 3"),
    "no batches": ({"batches": []}, "batches: there are none"),
    "no mapping": (
        {"batches": [torch.zeros(2)]},
        r"batches\[0\]: must be a mapping of what the model takes, got Tensor",
    ),
    "no tensor": ({"batches": [{"text": "hello"}]}, r"batches\[0\]: no tensor among them"),
    "empty batch": ({"batches": [{}]}, r"batches\[0\]: none were given"),
    "lists": ({"batches": [{"x": [[1.0]]}]}, r"batches\[0\].x: must be a tensor, got list"),
    "mode": ({"mode": "glo"}, "mode: must be gla, vla or vla_scores, got str 'glo'"),
    "limit": ({"limit": 0}, "limit: must be an int of at least 1, got int 0"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments(case: str) -> None:
    changed, message = WRONG_ARGUMENTS[case]
    given = {"model": tiny(), "batches": [tiny_inputs()], "epsilon": 0.1, **changed}
    with pytest.raises(CalibrationError, match=message) as caught:
        avl_fx.calibrate(given.pop("model"), given.pop("batches"), **given)
    assert caught.value.remedy


def test_a_wrong_compiler() -> None:
    with pytest.raises(OptionError, match="compiler"):
        avl_fx.calibrate(tiny(), [tiny_inputs()], epsilon=0.1, compiler="gcc")


def refused(model: nn.Module, batches: Iterable[Any], message: str, **settings: Any) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        avl_fx.calibrate(model, batches, epsilon=1.0, **settings)
    assert caught.value.remedy


def test_batches_that_teach_nothing() -> None:
    model = tiny()
    good, bad = tiny_batches(1)[0], {"x": tiny_inputs()["x"].clone()}
    bad["x"][1, 2] = torch.nan
    refused(model, told([good, bad]), r"batches\[1\]: the attention row of layer 0 holds NaN")
    refused(model, told([good], ".....", "....."), r"batches\[0\]: holds no visual token, it is text only")
    refused(model, [good], r"batches\[0\]: nobody knows which of its tokens are visual.*avl_fx.modality_ids")
    refused(model, told([good], ".##.."), r"batches\[0\]: nobody knows")  # of another batch size
    refused(model, told([{"x": good["x"][:, :1]}]), r"batches\[0\]: no attention of a decoder was found")


def test_a_text_only_batch_of_a_stock_model() -> None:
    zoo, model = get("llava"), model_of("llava")
    refused(model, [zoo.inputs(model, 1, first=3)], r"batches\[0\]: holds no visual token, it is text only")


class Broken(Tiny):
    """Dynamo cannot get from one layer to the next."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


def test_a_decoder_in_pieces() -> None:
    broken = Broken(layers=3).eval().requires_grad_(False)
    refused(broken, told(tiny_batches(1)), r"batches\[0\]: the decoder is in 3 graphs, and layers of different")


def test_a_decoder_whose_attention_is_refused() -> None:
    message = r"model: the attention of 0 layers can be observed, two are needed \(layer 0: .*; layer 1: .*\)"
    refused(tiny(rank=3), told(tiny_batches(1)), message)


def test_a_layer_that_is_refused_is_left_out_with_its_reason() -> None:
    model = Tiny(layers=4).eval().requires_grad_(False)
    model.layers[1].rank = 3
    found = calibrated(model, told(tiny_batches(1)), {"epsilon": 1.0})
    assert found.blocks == ((2, 3),)
    assert found.layers[1].excluded
    assert any(w.startswith("not observed, and in no block: layer 1: ") for w in found.warnings)


def test_images_through_cross_attention(tmp_path: Path) -> None:
    zoo, model, saved = get("mllama"), model_of("mllama"), tmp_path / "state"
    batches = [zoo.inputs(model, 2)]
    found = calibrated(model, batches, {"epsilon": 1.0}, state=saved)
    cross = {n for n, kind in enumerate(zoo.attention_kinds) if kind == "cross"}
    assert {n for n, layer in enumerate(found.layers) if layer.excluded == "cross-attention"} == cross
    assert not any(set(range(first, last + 1)) & cross for first, last in found.blocks)
    assert found.ratios is None
    with pytest.raises(CalibrationError, match="vision: no layer attends to all keys and to visual ones"):
        avl_fx.calibrate(model, batches, epsilon=1.0, vision=True, state=saved)
