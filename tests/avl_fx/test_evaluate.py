"""`evaluate`: what it counts is right, an interrupted run goes on, and wrong requests are refused."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

import avl_fx
from avl_fx import Contender, EvaluationBatch, EvaluationTask, Plan
from avl_fx._answers import TOP, _Listener, answers, dense_answers
from avl_fx._evaluation_picture import series
from avl_fx.errors import EvaluationError, OptionError, PlanError
from tests.oracle import lazy_oracle
from tests.zoo import ZOO

LLAVA = ZOO["llava"]
NEW = 5
BLOCKS = [(0, 3)]

pytestmark = pytest.mark.usefixtures("one_thread")


def decode(tokens):
    return [" ".join(map(str, row)) for row in tokens.tolist()]


@pytest.fixture(scope="module")
def model():
    return LLAVA.make("sdpa")


@pytest.fixture(scope="module")
def prompts(model):
    return [LLAVA.inputs(model, batch=2), LLAVA.inputs(model, batch=1, first=2)]


@pytest.fixture(scope="module")
def dense(model, prompts):
    """What the model says, in words."""
    said = []
    for inputs in prompts:
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        said.append(decode(out[:, inputs["input_ids"].shape[1] :]))
    return said


@pytest.fixture(scope="module")
def task(prompts, dense):
    batches = [EvaluationBatch(inputs, said) for inputs, said in zip(prompts, dense, strict=True)]
    return EvaluationTask(batches, decode, max_new_tokens=NEW, name="own words")


@pytest.fixture(scope="module")
def lazy(model, task, tmp_path_factory):
    """What is found of a lazy plan, and the folder that it is written to."""
    folder = tmp_path_factory.mktemp("lazy")
    return avl_fx.evaluate(model, task, {"lazy": Plan.lazy(BLOCKS)}, output=folder), folder


def test_the_identity_loses_nothing(model, task):
    report = avl_fx.evaluate(model, task, {"identity": Plan.identity()})
    assert list(report.results) == ["dense", "identity"]
    for found in report.results.values():
        assert (found.score.mean, found.difference.mean, found.same_answers, found.agreement) == (1, 0, 1, 1)
        assert found.divergence < 1e-6
        assert found.kv_share == 1
    assert (report.questions, report.groups) == (3, 3)


@torch.no_grad()
def test_divergence_is_that_of_the_oracle_along_the_dense_answer(model, lazy, prompts):
    """Computed in one forward over prompt and dense answer: lazy layers do not care how often they are asked."""
    found = lazy[0].results["lazy"]
    assert found.score.mean < 1
    divergences, agreements = [], []
    for inputs in prompts:
        said = dense_answers(model, Contender("dense"), inputs, NEW).tokens
        ids = torch.cat([inputs["input_ids"], said], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(said)], dim=1)
        whole = {**inputs, "input_ids": ids, "attention_mask": mask}
        p = model(**whole).logits[:, -NEW - 1 : -1].double().softmax(-1)
        with lazy_oracle(model, BLOCKS, LLAVA.decoder_prefix):
            q = model(**whole).logits[:, -NEW - 1 : -1].double().softmax(-1)
        top = p.topk(TOP).indices
        p_top, q_top = p.gather(-1, top), q.gather(-1, top)
        rest = (1 - p_top.sum(-1)) * ((1 - p_top.sum(-1)) / (1 - q_top.sum(-1))).log()
        kl = (p_top * (p_top / q_top).log()).sum(-1) + rest
        assert (kl <= (p * (p / q).log()).sum(-1) + 1e-9).all()
        divergences += kl.mean(1).tolist()
        agreements += (q.argmax(-1) == said).double().mean(1).tolist()
    assert found.divergence == pytest.approx(sum(divergences) / 3, rel=1e-3)
    assert found.agreement == pytest.approx(sum(agreements) / 3)


@torch.no_grad()
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan.avl(core=0.25, secondary=0.5, refresh=2, text=0.6), marks=pytest.mark.matrix),
        pytest.param(Plan.lazy(BLOCKS, "vla_scores"), marks=pytest.mark.matrix),
        Plan.avl(core=0.25, secondary=0.5, refresh=2).combine(Plan.lazy(BLOCKS, "vla")),
    ],
    ids=["avl", "vla_scores", "both"],
)
def test_a_second_run_may_begin_behind_the_prompt(model, prompts, plan, monkeypatch):
    """From a copy of the cache: the same as with another prompt."""
    way = Contender.of_plan(plan, compact=True)
    long, rows = [], prompts[0]["input_ids"].shape[1]
    forward = type(model.model).forward

    def counted(self, *args, **kwargs):
        long.append(kwargs["input_ids"].shape[1] == rows)
        return forward(self, *args, **kwargs)

    dense = dense_answers(model, Contender("dense"), prompts[0], NEW)
    other = dense.tokens.roll(1, 1)  # surely not what it says: both runs are needed
    dense = replace(dense, tokens=other)
    found, asked = [], []
    with way.prepare(model):
        for prompt_only in ((), ("pixel_values",)):
            monkeypatch.setattr(type(model.model), "forward", counted)
            long.clear()
            found.append(answers(model, way, prompts[0], NEW, dense, prompt_only))
            asked.append(sum(long))
    once, again = found[1], found[0]
    assert torch.equal(once.tokens, again.tokens)
    assert once.divergence == pytest.approx(again.divergence, rel=1e-4, abs=1e-6)
    assert once.agreement == again.agreement
    assert once.cache_bytes == again.cache_bytes
    assert asked == [2, 1]


def test_a_compact_cache_is_smaller(model, task):
    plan = Plan.avl(core=0.25, secondary=0.5, refresh=2, text=1.0)
    ways = {"stock": plan, "compact": Contender.of_plan(plan, compact=True)}
    found = avl_fx.evaluate(model, task, ways, limit=1).results
    stock, compact = found["stock"], found["compact"]
    assert stock.kv_share == 1
    assert compact.kv_share < 0.9
    assert compact.score == stock.score
    assert compact.budget == 0.25


def test_bytes_are_those_behind_the_dense_answer(model, prompts):
    """An answer of `NEW` tokens beside a dense one of three: the longer cache says nothing of the contender."""
    dense = dense_answers(model, Contender("dense"), prompts[0], 3)
    dense = replace(dense, tokens=dense.tokens.roll(1, 1))
    found = answers(model, Contender("dense again"), prompts[0], NEW, dense)
    assert found.tokens.shape[1] == NEW > dense.tokens.shape[1]
    assert found.cache_bytes == dense.cache_bytes


def test_it_stops_counting_at_the_end_of_an_answer(model, prompts):
    """A row that ends early is followed by padding, which nobody is judged by."""
    inputs = prompts[0]
    free = dense_answers(model, Contender("dense"), inputs, NEW)
    end = int(free.tokens[0, 1])
    ended = replace(free, lengths=())
    config = model.generation_config
    before = config.eos_token_id
    config.eos_token_id = [9999, end]
    try:
        ended = dense_answers(model, Contender("dense"), inputs, NEW)
    finally:
        config.eos_token_id = before
    assert ended.lengths[0] == 2
    assert free.lengths == (NEW, NEW)
    assert ended.tokens[0, :2].tolist() == free.tokens[0, :2].tolist()


def test_a_step_is_timed_without_what_the_evaluation_does(model, prompts, monkeypatch):
    """A clock that moves by one whenever it is read: two readings a step, one of them the listener's own."""
    ticks = iter(range(10_000))
    monkeypatch.setattr("avl_fx._answers.time.perf_counter", lambda: float(next(ticks)))
    assert dense_answers(model, Contender("dense"), prompts[0], NEW).step_seconds == 1
    assert dense_answers(model, Contender("dense"), prompts[0], 1).step_seconds is None


def test_a_step_that_compiles_is_not_timed(monkeypatch):
    """The first step compiles a graph, the second one another, for any length; the third and fourth are steps."""
    ticks, compiled = iter(range(100)), iter([7, 8, 9, 9, 9])
    monkeypatch.setattr("avl_fx._answers.time.perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr("avl_fx._answers._compat.compilations", lambda: next(compiled))
    listener = _Listener()
    for _ in range(3):
        listener(torch.zeros(1, 1, dtype=torch.long), torch.randn(1, 80))
    assert listener.step_seconds() is None
    for _ in range(2):
        listener(torch.zeros(1, 1, dtype=torch.long), torch.randn(1, 80))
    assert listener.seconds == [None, None, 1.0, 1.0]


@pytest.mark.parametrize(
    ("seconds", "period", "expected"),
    [
        ([1.0, 1.0, 4.0], 1, 1.0),
        ([1.0, 1.0, 4.0, 1.0, 1.0, 4.0, 2.0, 1.0, 4.0], 3, 2.0),
        ([1.0, None, 1.0, 4.0, 1.0, 9.0], 3, 2.0),  # three in a row begin behind the one that compiled
        ([1.0, None, 4.0], 3, 2.5),  # not three in a row: all that were timed
        ([None], 3, None),
    ],
)
def test_steps_of_a_period_are_timed_together(seconds, period, expected):
    listener = _Listener()
    listener.seconds = seconds
    assert listener.step_seconds(period) == expected


def test_a_plan_that_refreshes_is_timed_over_its_refreshes():
    periods = {0: 1, 1: 1, 3: 3}
    for refresh, period in periods.items():
        assert Contender.of_plan(Plan.avl(core=0.3, secondary=0.5, refresh=refresh)).period == period
    assert Contender.of_plan(Plan.identity()).period == 1


def apart_from_time(report):
    """What two runs have in common."""
    found = report.to_dict()
    assert all(result.pop("step_seconds") > 0 for result in found["results"].values())
    return found


class Stop(Exception):
    pass


def counted(model, monkeypatch):
    calls = []
    real = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **kw: calls.append(1) or real(self, **kw))
    return calls


@contextlib.contextmanager
def blind(model, inputs):
    """The control by shuffling: other pictures, the same questions."""
    yield {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}


def test_an_interrupted_run_goes_on(model, task, tmp_path, monkeypatch):
    way = Contender("blind", around=blind)
    whole = avl_fx.evaluate(model, task, {"blind": way}, output=tmp_path / "whole")
    seen = []

    @contextlib.contextmanager
    def tired(model, inputs):
        seen.append(1)
        if len(seen) > 2:  # the second batch: the first takes one run along the dense answer more
            raise Stop
        with blind(model, inputs) as given:
            yield given

    with pytest.raises(Stop):
        avl_fx.evaluate(model, task, {"blind": replace(way, around=tired)}, output=tmp_path / "cut")
    journal = tmp_path / "cut" / "answers.jsonl"
    kept = journal.read_text().splitlines()
    assert len(kept) == 1 + 2 + 1
    journal.write_text(journal.read_text() + '{"key": "half a li')
    calls = counted(model, monkeypatch)
    again = avl_fx.evaluate(model, task, {"blind": way}, output=tmp_path / "cut")
    assert apart_from_time(again) == apart_from_time(whole)
    assert journal.read_text().splitlines()[:4] == kept
    assert len(calls) == 2 + 2  # dense twice: how sure it was is not saved; the second batch with a run along it
    calls.clear()
    assert avl_fx.evaluate(model, task, {"blind": way}, output=tmp_path / "cut").to_dict() == again.to_dict()
    assert len(calls) == 2


def test_it_writes_table_json_and_picture(lazy):
    report, folder = lazy
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads(report.to_json())
    table = (folder / "evaluation.md").read_text()
    assert table == str(report)
    assert "| lazy |" in table
    assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_questions_about_one_picture_are_one_group(model, task):
    batches = [replace(b, groups=["same picture"] * len(b.references)) for b in task.batches]
    report = avl_fx.evaluate(model, replace(task, batches=batches), {})
    assert report.groups == 1
    assert report.results["dense"].score.low == report.results["dense"].score.high == 1


def test_contenders_may_change_the_inputs(model, task):
    found = avl_fx.evaluate(model, task, {"blind": Contender("blind", around=blind)}).results["blind"]
    assert found.same_answers < 1
    assert found.divergence > 0.01


def test_the_model_is_left_as_it_was(model, task):
    avl_fx.compile(model, Plan.identity(), options={"compiler": "eager"})
    try:
        before = {name: module._compiled_call_impl for name, module in model.named_modules()}
        avl_fx.evaluate(model, task, {"lazy": Plan.lazy(BLOCKS)}, limit=1)
        assert {name: module._compiled_call_impl for name, module in model.named_modules()} == before
    finally:
        avl_fx.uncompile(model)


# ---- refused -----------------------------------------------------------------------------------------------------


def bad(task, **changes):
    return replace(task, **changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"metric": "exakt"}, "task.metric"),
        ({"max_new_tokens": 0}, "task.max_new_tokens"),
        ({"batches": []}, "task.batches"),
        ({"batches": [{"input_ids": 1}]}, r"task.batches\[0\]"),
        ({"batches": [EvaluationBatch({}, [])]}, r"task.batches\[0\]"),
        ({"batches": [EvaluationBatch({}, ["a"], ["x", "y"])]}, r"task.batches\[0\]"),
    ],
)
def test_a_wrong_task_is_refused(model, task, changes, field):
    with pytest.raises(EvaluationError, match=field):
        avl_fx.evaluate(model, replace(task, **changes), {"identity": Plan.identity()})


def test_one_reference_a_row(model, task):
    batches = [replace(task.batches[0], references=["one"])]
    with pytest.raises(EvaluationError, match="1 references, 2 rows generated"):
        avl_fx.evaluate(model, replace(task, batches=batches), {})


def test_wrong_requests_are_refused(model, task):
    with pytest.raises(EvaluationError, match="model"):
        avl_fx.evaluate(torch.nn.Linear(1, 1), task, {})
    with pytest.raises(EvaluationError, match="task"):
        avl_fx.evaluate(model, [1], {})
    with pytest.raises(EvaluationError, match="limit"):
        avl_fx.evaluate(model, task, {}, limit=0)
    with pytest.raises(EvaluationError, match="another name"):
        avl_fx.evaluate(model, task, {"dense": Plan.identity()})
    with pytest.raises(EvaluationError, match="an identity of its own"):
        avl_fx.evaluate(model, task, {"a": Contender("x"), "b": Contender("x")})
    with pytest.raises(PlanError):
        avl_fx.evaluate(model, task, {"a": "no_such_preset"})
    with pytest.raises(OptionError, match="compiler"):
        avl_fx.evaluate(model, task, {"a": Plan.identity()}, compiler="gcc")


def test_answers_of_another_run_are_not_mixed(model, task, tmp_path):
    avl_fx.evaluate(model, task, {}, output=tmp_path)
    before = (tmp_path / "answers.jsonl").read_text()
    with pytest.raises(EvaluationError, match="of another run"):
        avl_fx.evaluate(model, replace(task, max_new_tokens=NEW + 1), {}, output=tmp_path)
    other = [replace(b, references=["something else"] * len(b.references)) for b in task.batches]
    with pytest.raises(EvaluationError, match="answers to other questions"):
        avl_fx.evaluate(model, replace(task, batches=other), {}, output=tmp_path)
    assert (tmp_path / "answers.jsonl").read_text() == before
    (tmp_path / "answers.jsonl").write_text("hello\n")
    with pytest.raises(EvaluationError, match="no journal"):
        avl_fx.evaluate(model, task, {}, output=tmp_path)


def test_logits_that_are_not_finite_are_noticed(model, task):
    @contextlib.contextmanager
    def broken(model):
        kept = model.lm_head.weight.detach().clone()
        model.lm_head.weight.data.fill_(torch.nan)
        try:
            yield
        finally:
            model.lm_head.weight.data.copy_(kept)

    with pytest.raises(EvaluationError, match="not finite"):
        avl_fx.evaluate(model, task, {"broken": Contender("broken", prepare=broken)})


def test_an_output_that_is_a_file_is_refused(model, task, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EvaluationError, match="output"):
        avl_fx.evaluate(model, task, {}, output=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_picture_joins_what_differs_in_a_share_alone():
    found = series(["A-VL 50%", "random 50%", "A-VL 12.5%", "lazy 6, gla", "50%", "random 10 %"])
    assert found == {
        "A-VL": ["A-VL 50%", "A-VL 12.5%"],
        "random": ["random 50%", "random 10 %"],
        "lazy 6, gla": ["lazy 6, gla"],
        "50%": ["50%"],
    }
