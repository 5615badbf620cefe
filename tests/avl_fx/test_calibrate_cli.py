"""`avl calibrate`: what it prints and writes, and one line for every error."""

import json
import sys

import pytest

from avl_fx.plan import Plan
from tests.avl_fx._cli import Command

FACTORY = """
import avl_fx
from tests.avl_fx._explained import spans, tiny, tiny_inputs

MADE = []

def told(batches):
    for batch in batches:
        with avl_fx.modality_ids(spans(".##..", "..##.")):
            yield batch

def make():
    return tiny(), told([tiny_inputs(), tiny_inputs()])

def of_images(paths):
    MADE.extend(path.name for path in paths)
    return tiny(), told([tiny_inputs() for _ in paths])

def unknown():
    return tiny(), [tiny_inputs()]

def nothing():
    return tiny(), []

def one_batch():
    return tiny(), tiny_inputs()

def no_model():
    raise AssertionError("the model was made")
"""

pytestmark = pytest.mark.usefixtures("one_thread")


avl = Command("calibrate")
error_of = avl.error_of


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_models", None)


def test_a_table_and_the_files(folder):
    result = avl("-f", "my_models:make", "--lazy-share", 0.5, "-o", "out/a", "--mode", "vla")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["1", "full", "lazy", "0"] in [line[:4] for line in lines]
    assert ["0", "full", "anchor", "-"] in [line[:4] for line in lines]
    for part in ("4 prompts in 2 batches", "1 of 2 layers", "KV bytes", "plan.json"):
        assert part in result.stdout
    assert Plan.from_json(folder / "out" / "a" / "plan.json").lazy_policy.mode == "vla"
    assert result.stderr == ""


def test_json(folder):
    result = avl("--factory", "my_models.py:make", "--epsilon", 0, "--limit", 1, "--json", "--state", "state")
    data = json.loads(result.stdout)
    assert (data["target"], data["value"], data["batches"], data["blocks"]) == ("epsilon", 0.0, 1, [])
    assert data["warnings"]
    # Another target, the same state.
    data = json.loads(
        avl("-f", "my_models:make", "--max-divergence", 1, "--limit", 1, "--json", "--state", "state").stdout
    )
    assert data["blocks"] == [[0, 1]]


def test_images_go_to_the_factory(folder):
    images = folder / "images"
    (images / "inside").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "notes.txt", "inside/c.png"):
        (images / name).write_bytes(b"")
    data = json.loads(
        avl("-f", "my_models:of_images", "--images", images, "--kv-saving", 0.2, "--vision", "--json").stdout
    )
    assert sys.modules["my_models"].MADE == ["a.jpg", "b.PNG"]
    assert data["batches"] == 2
    assert data["plan"]["vision"]["core"] == data["ratios"]["core"]


def test_errors_before_the_model_is_made(folder):
    (folder / "empty").mkdir()
    made = ("-f", "my_models:no_model")
    assert "target: one of epsilon, lazy_share, kv_saving" in error_of(*made)
    assert "give one of them, not epsilon and lazy_share" in error_of(*made, "--epsilon", 1, "--lazy-share", 0.5)
    assert "epsilon: divergences are at least 0, got -1" in error_of(*made, "--epsilon", -1)
    assert "lazy_share: a share lies between 0 and 1" in error_of(*made, "--lazy-share", 1.5)
    target = (*made, "--epsilon", 1)
    assert "--images: there is no folder 'no'" in error_of(*target, "--images", "no")
    assert "--images: 'my_models.py' is no folder" in error_of(*target, "--images", "my_models.py")
    assert "--images: there are no images in 'empty'" in error_of(*target, "--images", "empty")


def test_wrong_factories(folder):
    (folder / "a.png").write_bytes(b"")
    target = ("--epsilon", 1)
    assert "--factory: there is no module 'no_models'" in error_of("-f", "no_models:make", *target)
    assert "--factory: there is no file 'no.py'" in error_of("-f", "no.py:make", *target)
    assert "did you mean 'make'?" in error_of("-f", "my_models:mak", *target)
    assert "must return (model, batches)" in error_of("-f", "my_models:one_batch", *target)
    assert "must take nothing. Fix: give --images DIR" in error_of("-f", "my_models:of_images", *target)
    assert "must take one argument" in error_of("-f", "my_models:make", *target, "--images", folder)


def test_errors_of_the_run(folder):
    target = ("--epsilon", 1)
    assert "batches: there are none" in error_of("-f", "my_models:nothing", *target)
    assert "batches[0]: nobody knows which of its tokens are visual" in error_of("-f", "my_models:unknown", *target)
    assert "mode: must be gla" in error_of("-f", "my_models:make", *target, "--mode", "glo")
    assert "limit: must be an int of at least 1" in error_of("-f", "my_models:make", *target, "--limit", 0)
    assert "state: '.' is a directory" in error_of("-f", "my_models:make", *target, "--state", ".")
    assert "report: cannot make the folder" in error_of("-f", "my_models:make", *target, "-o", "my_models.py")
