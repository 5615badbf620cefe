"""The picture of how the mixture was learnt shows every stage behind the one before."""

import json

import pytest

from examples.petite_vlm.stages import (
    ADAPTER,
    LEARNT,
    READER,
    STAGES,
    UNDER_PLANS,
    draw,
    draw_modes,
    main,
    questions_after,
)


def stage(name, steps):
    points = [{"step": step, "loss": 1.0 / step, "accuracy": 0.5} for step in range(10, steps + 1, 10)]
    asked = {**dict.fromkeys(LEARNT, 0.5), **{f"{name} tokens": 0.75 for name in LEARNT}}
    return {
        "name": name,
        "steps": steps,
        "images_per_step": 6,
        "curve": points,
        "evaluations": [{"step": steps} | asked],
    }


def test_steps_are_counted_on():
    first, second = questions_after([stage("b", 20), stage("unused", 50), stage("a", 30)], ["a", "b"])
    assert [point["step"] for point in first["curve"]] == [10, 20, 30]
    assert [point["step"] for point in second["curve"]] == [40, 50]
    assert second["evaluations"][0]["step"] == 50


def test_an_unknown_stage_is_an_error():
    with pytest.raises(KeyError, match="c"):
        questions_after([stage("a", 30)], ["a", "c"])


def test_the_picture_has_every_data_set_of_every_stage():
    loss, whole, tokens = draw(questions_after([stage("a", 30), stage("b", 20)], ["a", "b"])).axes
    assert loss.lines[0].get_xdata().tolist() == [10, 20, 30, 40, 50]
    assert [line.get_label() for line in whole.lines[: len(LEARNT)]] == list(LEARNT)
    assert whole.lines[0].get_xdata().tolist() == [30, 50]
    assert tokens.lines[0].get_ydata().tolist() == [0.75, 0.75]


def test_the_committed_stages_are_those_of_the_adapter():
    stages = questions_after(json.loads(STAGES.read_text()), ADAPTER)
    assert sum(stage["steps"] for stage in stages) == 865
    assert all(name in stages[0]["evaluations"][-1] for name in LEARNT)
    reader = questions_after(json.loads(STAGES.read_text()), READER)
    assert [(stage["steps"], stage["images_per_step"]) for stage in reader] == [(400, 64), (130, 6)]


def test_turns_are_drawn_by_mode():
    """Steps 1, 3, 5, ... are the first mode's; two of them make a point."""
    modes, steps = ["gla", "vla"], range(1, 9)
    asked = {f"{name}, {mode} tokens": share for name in LEARNT for mode, share in (("gla", 0.25), ("vla", 0.75))}
    curve = [{"step": step, "loss": 1.0 if step % 2 else 2.0 * step} for step in steps]
    stage = {"modes": modes, "curve": curve, "evaluations": [{"step": 8} | asked]}
    loss, first, second = draw_modes(stage, together=2).axes
    assert [line.get_label() for line in loss.lines] == modes
    assert loss.lines[0].get_ydata().tolist() == [1.0, 1.0]
    assert loss.lines[1].get_ydata().tolist() == [6.0, 14.0]
    assert loss.lines[1].get_xdata().tolist() == [4, 8]
    assert (first.lines[0].get_ydata().tolist(), second.lines[0].get_ydata().tolist()) == ([0.25], [0.75])


def test_both_pictures_are_made(tmp_path):
    main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in STAGES.parent.glob("*.png")}
    (under,) = [stage for stage in json.loads(STAGES.read_text()) if stage["name"] == UNDER_PLANS]
    assert len(under["curve"]) == under["steps"] == 390
