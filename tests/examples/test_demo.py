"""The demo's parts that need no download; `make demo` itself runs the rest."""

import json

import torch
from PIL import Image
from torch import nn

from avl_fx import Plan
from examples import demo


def test_the_lazy_plan_fits_the_petite_model():
    plan = Plan.from_json(demo.LAZY_PLAN)
    plan.check_depth(30)
    plan.check_supported()
    assert len(plan.lazy_policy.lazy_layers) == 13


def test_every_question_has_its_picture_and_answer():
    questions = demo.load_questions()
    assert questions
    for question in questions:
        assert (demo.ASSETS / question["image"]).is_file()
        assert question["question"].endswith("?")
        assert question["answer"]
    assert json.loads((demo.ASSETS / "questions.json").read_text()) == questions


def test_running_times_every_call_and_puts_forward_back():
    model = nn.Linear(2, 2)
    with demo.running(model, model.forward) as seconds:
        model(torch.zeros(1, 2))
        model(torch.zeros(1, 2))
    assert len(seconds) == 2
    assert "forward" not in vars(model)


def test_draw_makes_a_picture(tmp_path):
    questions = demo.load_questions()
    answers = [q["answer"] for q in questions]
    runs = [
        demo.Contender(name, lambda: None, answers=answers, kv_bytes=2**20, step_seconds=[0.01] * 12)
        for name in ("dense", "lazy")
    ]
    demo.draw(questions, runs, tmp_path / "deep" / "demo.png")
    assert Image.open(tmp_path / "deep" / "demo.png").size[0] > 500


def test_rate_is_rows_over_the_median_step():
    contender = demo.Contender("x", lambda: None, step_seconds=[0.1] * 11 + [9.0])
    assert contender.rate(rows=8) == 80.0
    low, high = contender.spread(rows=8)
    assert low <= 80.0 <= high + 1e-9
