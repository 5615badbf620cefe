"""`avl eval`: what it prints and writes, and one line for every error."""

import json

import pytest

from avl_fx.plan import Plan
from tests.avl_fx._cli import Command

FACTORY = """
from avl_fx import EvaluationBatch, EvaluationTask
from tests.zoo import ZOO

def decode(tokens):
    return [" ".join(map(str, row)) for row in tokens.tolist()]

def make():
    model = ZOO["llava"].make("sdpa")
    inputs = ZOO["llava"].inputs(model, batch=2)
    return model, EvaluationTask([EvaluationBatch(inputs, ["1 2", "3"])], decode, max_new_tokens=3)

def pairs():
    return ZOO["llava"].make("sdpa"), {"batches": []}

def no_model():
    raise AssertionError("the model was made")
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "factory.py"
    path.write_text(FACTORY)
    return path


avl = Command("eval")
error_of = avl.error_of


def test_it_prints_a_table_and_writes_the_report(factory, tmp_path):
    plan = tmp_path / "two.json"
    Plan.lazy([(1, 2)]).to_json(plan)
    out = tmp_path / "out"
    said = avl("-f", f"{factory}:make", "-p", plan, "-p", "same=identity", "-o", out).stdout
    assert [line.split("|")[1].strip() for line in said.splitlines()[4:]] == ["dense", "two", "same"]
    assert (out / "evaluation.md").read_text() == said
    again = json.loads(avl("-f", f"{factory}:make", "-p", plan, "-p", "same=identity", "-o", out, "--json").stdout)
    assert again == json.loads((out / "evaluation.json").read_text())
    assert again["results"]["same"]["same_answers"] == 1


def test_wrong_requests(factory, tmp_path):
    make = f"{factory}:make"
    assert "no plan was given" in error_of("-f", f"{factory}:no_model")
    assert "two plans are called 'a'" in error_of("-f", f"{factory}:no_model", "-p", "a=identity", "-p", "a=identity")
    assert "must return (model, task)" in error_of("-f", f"{factory}:pairs", "-p", "identity")
    assert "nor an existing file" in error_of("-f", make, "-p", tmp_path / "missing.json")
    assert "limit" in error_of("-f", make, "-p", "identity", "--limit", 0)
    assert "compiler" in error_of("-f", make, "-p", "identity", "--compiler", "gcc")
