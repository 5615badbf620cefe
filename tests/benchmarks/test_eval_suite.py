"""The evaluation of the petite model: who takes part, what is asked, what is drawn; and (slow) a run of it."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from avl_fx import Contender, Plan
from benchmarks.eval import tasks
from benchmarks.eval.contenders import CORE_OF_SECONDARY, WAYS, ablations, contenders, kept_to_compute, partitioned
from benchmarks.eval.controls import CONTROLS
from benchmarks.eval.overlay import Choices, draw
from benchmarks.eval.page import main, page
from benchmarks.eval.speed import everyone
from benchmarks.eval.tuned import with_weights_of
from examples.petite_vlm.data import DATASETS, Question
from examples.petite_vlm.model import trained_under

BLOCKS = [(2, 9), (12, 20)]


def test_every_control_meets_every_budget():
    found = contenders([0.5, 0.1], [BLOCKS, BLOCKS[:1]], 30, "eager")
    assert {f"{name} {share}" for name in CONTROLS for share in ("50%", "10%")} < set(found)
    assert {f"{way} {share}" for way in WAYS for share in ("50%", "10%")} < set(found)
    assert {"down-sampled 50%", "other pictures"} < set(found)
    ours = [name for name in found if name.startswith("A-VL ") and "lazy" not in name]
    assert ours == ["A-VL 50%", "A-VL 10%", "A-VL 17%"], "what computes 10% as well"
    assert partitioned(kept_to_compute(0.1)).vision_policy.core == 0.1
    assert [name for name in found if "lazy" in name] == [
        "lazy 15, gla",
        "lazy 15, vla",
        "lazy 15, vla_scores",
        "lazy 15, gla, random blocks",
        "A-VL 50% and lazy 15, vla_scores",
        "lazy 7, gla",
        "lazy 7, vla",
        "lazy 7, vla_scores",
        "A-VL 50% and lazy 7, vla_scores",
    ]
    assert len({way.identity for way in found.values()}) == len(found)


def test_who_was_trained_under_plans_takes_part_under_each(tmp_path):
    plans = [Plan.lazy(BLOCKS, mode, num_layers=30) for mode in ("gla", "vla_scores", "gla")]
    adapter = adapter_of(tmp_path, plans)
    assert [plan.lazy_policy.mode for plan in trained_under(adapter)] == ["gla", "vla_scores"], "each once"
    found = contenders([0.5, 0.1], [], 30, "eager", adapter)
    assert [name for name in found if "tuned" in name] == [
        "tuned, dense",
        "tuned lazy 15, gla",
        "A-VL 50% and tuned lazy 15, gla",
        "tuned lazy 15, gla, other pictures",
        "tuned lazy 15, vla_scores",
        "A-VL 50% and tuned lazy 15, vla_scores",
    ]
    both = [*found.values(), *contenders([0.3], [BLOCKS], 30, "eager").values()]
    assert len({way.identity for way in both}) == len(both) - 1, "nobody is taken for who has the model's own weights"


def test_other_weights_are_put_back(tmp_path, monkeypatch):
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with torch.no_grad():
        other.bias.copy_(model.bias)
    before, seen = {name: value.clone() for name, value in model.state_dict().items()}, []
    monkeypatch.setattr("benchmarks.eval.tuned.load_petite_vlm", lambda adapter: (other, None))

    @contextlib.contextmanager
    def breaks(model):
        seen.append(model.weight.clone())
        raise RuntimeError("stop")
        yield

    way = with_weights_of(adapter_of(tmp_path, []), Contender("inner", prepare=breaks))
    with pytest.raises(RuntimeError, match="stop"), way.prepare(model):
        pass
    assert torch.equal(seen[0], other.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert way.identity != "inner"


def adapter_of(folder, plans):
    path = folder / "adapter.safetensors"
    recipe = json.dumps({"plans": [plan.to_json() for plan in plans]})
    save_file({"nothing": torch.zeros(1)}, path, metadata={"recipe": recipe})
    return path


def test_without_blocks_nothing_is_lazy():
    assert not [name for name in contenders([0.3], [], 30, "eager") if "lazy" in name]


def test_a_budget_is_what_is_kept():
    vision = partitioned(0.3).vision_policy
    assert (vision.secondary, vision.core) == (0.3, pytest.approx(0.3 * CORE_OF_SECONDARY))


def test_ablations_change_one_thing_each():
    found = ablations(0.3, BLOCKS, 30, "eager")
    assert len({way.identity for way in found.values()}) == len(found) == 20 + 3
    assert all(way.budget == pytest.approx(0.3 * CORE_OF_SECONDARY) for way in found.values())


def test_every_data_set_has_its_metric():
    assert tasks.METRIC_OF.keys() == DATASETS.keys()


def test_neighbours_ask_about_different_pictures():
    asked = [Question(image, str(turn), "a") for image in range(3) for turn in range(1 + image)]
    order = [(asked[place].text, asked[place].image) for place in tasks._spread(asked)]
    assert order == [("0", 0), ("1", 1), ("2", 2), ("0", 1), ("0", 2), ("1", 2)]


def test_the_overlay_shows_what_was_chosen():
    """Red where core is, dark where nothing is kept; by the colours in the middle of the patches."""
    core = torch.zeros(3, 4, 16, dtype=torch.bool)
    core[:, :, 0] = True
    secondary = torch.zeros(4, 16, dtype=torch.bool)
    secondary[:, :8] = True
    figure = draw(Image.new("RGB", (56, 56), "white"), "what?", Choices(core, secondary, "it"), [0, 3], [0, 2])
    panel = figure.axes[1]
    layers = [image.get_array() for image in panel.get_images()[1:]]
    assert [layer.shape for layer in layers] == [(4, 4, 4)] * 3
    minor, kept, red = (layer[..., 3] > 0 for layer in layers)
    assert minor[2:].all()
    assert not minor[:2].any()
    assert red[0, 0]
    assert red.sum() == 1
    assert kept.sum() == 7
    assert panel.get_title() == "layer 0"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # six plans are compiled, for thirty layers each
def test_a_short_run(tmp_path):
    """All of `python -m benchmarks.eval`, on two pictures of one data set."""
    from benchmarks.eval.__main__ import main

    def run():
        main(
            datasets=["easy_vqa"],
            shares=[0.3],
            images=2,
            calibration=8,
            batch=4,
            output=tmp_path,
        )
        return json.loads((tmp_path / "easy_vqa" / "evaluation.json").read_text())

    found = run()["results"]
    assert found["dense"]["score"]["mean"] == 1
    assert found["A-VL 30%"]["score"]["mean"] == 1
    assert found["other pictures"]["score"]["mean"] < 1
    assert run()["results"] == found


def test_the_page_states_what_was_found():
    interval = {"mean": 0.5, "low": 0.25, "high": 0.75}
    result = {"score": interval, "difference": {"mean": -0.1, "low": -0.2, "high": 0.0}, "divergence": 0.0625}
    result |= {"kv_share": 0.4, "step_seconds": 0.0423}
    results = {"dense": result, "A-VL 30%": result, "random 30%": result | {"step_seconds": None}}
    report = {"metric": "exact", "questions": 9, "groups": 3, "results": results}
    said = page({"composites": report}, {})
    assert "Ablations" not in said
    assert "## composites: vqa, exact" in said
    assert "| A-VL 30% | 50.0% | 25.0% to 75.0% | -10.0 (-20.0 to +0.0) | 0.062 | 40% |" in said
    assert "| random 30% | 50.0% | 25.0% to 75.0% | -10.0 (-20.0 to +0.0) | 0.062 |  |" in said
    assert all(f"| {name} |" in said for name in CONTROLS)
    both = page({"composites": report}, {"scenes": report | {"results": {"never refreshed": result}}})
    assert both.startswith(said)
    assert "### scenes" in both
    assert "| never refreshed | 50.0% |" in both


def test_the_page_says_how_fast_a_step_is():
    results = {
        name: {"step_seconds": seconds, "kv_share": share}
        for name, seconds, share in (
            ("dense", 0.2, 1.0),
            ("Inductor", 0.1, 1.0),
            ("A-VL 30%", 0.04, 0.35),
            ("lazy", None, 0.6),
        )
    }
    where = {"processor": "abacus", "threads": 2, "rows": 16, "adapter": "reader"}
    timed = {"results": results, "machine": where}
    said = page({}, {}, {"scenes": timed})
    assert "a step that does not refresh" in said
    new = page({}, {}, {"scenes": timed | {"machine": where | {"refreshes": True}}})
    assert "the mean over the steps from one refresh to the next" in new
    assert "(abacus, threads: 2)" in said
    assert "| eager | 200.0 | 0.50x |" in said
    assert "| A-VL 30% | 40.0 | 2.50x |" in said
    assert "| lazy | not timed | |" in said
    assert "## Speed" not in page({}, {})


def test_everybody_is_timed_against_inductor(tmp_path):
    plans = [Plan.lazy(BLOCKS, mode, num_layers=30) for mode in ("gla", "vla_scores")]
    assert list(everyone(adapter_of(tmp_path, plans))) == [
        "Inductor",
        "identity",
        "A-VL 50%",
        "A-VL 30%",
        "A-VL 10%",
        "lazy 15, gla",
        "A-VL 50% and lazy 15, gla",
        "lazy 15, vla_scores",
    ]


def test_the_page_links_what_was_drawn(tmp_path):
    """By paths from where the page lies; what was not drawn is not linked."""
    interval = {"mean": 0.5, "low": 0.25, "high": 0.75}
    dense = {"score": interval, "difference": interval, "divergence": 0.0, "kv_share": 1.0, "step_seconds": 0.1}
    report = {"metric": "exact", "questions": 9, "groups": 3, "results": {"dense": dense}}
    for name in ("words", "composites"):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "evaluation.json").write_text(json.dumps(report))
    (tmp_path / "results" / "words" / "evaluation.png").touch()
    (tmp_path / "results" / "words" / "machine.json").write_text('{"processor": "abacus", "adapter": "reader"}')
    (tmp_path / "results" / "overlays").mkdir()
    (tmp_path / "results" / "overlays" / "composites.png").touch()
    (tmp_path / "docs").mkdir()
    main(tmp_path / "results", tmp_path / "docs" / "results.md")
    said = (tmp_path / "docs" / "results.md").read_text()
    links = [line.rpartition("(")[2].rstrip(")") for line in said.splitlines() if line.startswith("![")]
    assert links == ["../results/overlays/composites.png", "../results/words/evaluation.png"]
    assert "9 questions about 3 pictures." in said
    assert "9 questions about 3 pictures, asked of `reader`." in said
