"""`avl`: what it prints, and one line for every error."""

import json
import subprocess
import sys

import pytest
import torch

import avl_fx
from avl_fx import _compat, env_report
from avl_fx.plan import Plan
from tests.avl_fx._cli import Command

FACTORY = """
from tests.avl_fx._explained import tiny, tiny_inputs

def make():
    return tiny(), tiny_inputs()

def no_tuple():
    return tiny()

def no_inputs():
    return tiny(), {}

def raises():
    raise KeyError("weights\\nare missing")

def clash():
    return tiny(), {**tiny_inputs(), "plan": None}

def own_loop():
    return tiny(), {**tiny_inputs(), "run": lambda model, x: [model(x), model(x)]}

def stopping():
    from avl_fx.errors import CacheStateError
    def run(model, **inputs):
        model(**inputs)
        raise CacheStateError("keys are gone", remedy="start again")
    return tiny(), {**tiny_inputs(), "run": run}

number = 3
"""


avl = Command()
error_of = avl.error_of


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(FACTORY)
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "my_models.py"
    sys.modules.pop("my_models", None)


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- avl, avl env ----------------------------------------------------------------------------------------------------


def test_version_and_help():
    assert avl("--version").stdout == f"avl_fx {avl_fx.__version__}\n"
    for words in ([], ["plan"], ["explain"], ["env"], ["plan", "make"]):
        text = avl(*words, "--help").stdout
        assert "Usage: avl" in text.replace("root", "avl")
        assert avl(*words, "-h").stdout == text
    assert "explain" in avl("--help").stdout


def test_no_arguments_show_the_help():
    assert "Commands" in avl(code=2).output
    assert "Commands" in avl("plan", code=2).output


def test_unknown_command():
    assert "No such command" in avl("expalin", code=2).output


def test_env_as_text():
    text = avl("env").stdout
    for part in (f"torch         {torch.__version__}", "transformers", "python", "cpu", "gpu", "c++ compiler"):
        assert part in text


def test_env_as_json():
    data = json.loads(avl("env", "--json").stdout)
    assert data == json.loads(json.dumps(env_report.collect()))
    assert list(data) == [
        "packages",
        "python",
        "os",
        "machine",
        "cpu",
        "gpus",
        "cuda",
        "hip",
        "cpp_compiler",
        "environment",
    ]
    assert data["packages"]["torch"] == torch.__version__
    assert data["cpu"]["count"] >= data["cpu"]["usable"] >= 1


def test_env_where_little_is_known(monkeypatch):
    monkeypatch.setattr(_compat, "cpp_compiler", lambda: None)
    monkeypatch.setattr(env_report, "_version", lambda package: None)
    monkeypatch.setattr(env_report, "_cpuinfo", dict)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    text = avl("env").stdout
    assert "not found: Inductor cannot compile for the CPU" in text
    assert "transformers  not installed" in text
    assert "OMP_NUM_THREADS=1" in text
    assert "hidden" not in text


def test_env_with_gpus(monkeypatch):
    gpus = [{"name": "A GPU", "memory_gib": 80.0, "architecture": "sm_90"}]
    monkeypatch.setattr(env_report, "_gpus", lambda: gpus)
    assert "A GPU, 80.0 GiB, sm_90" in avl("env").stdout


# ---- avl plan --------------------------------------------------------------------------------------------------------


def test_make_show_check(tmp_path):
    file = tmp_path / "plan.json"
    result = avl(
        "plan", "make", "--lazy", "4-12", "--lazy", "20-29", "--layers", 32, "-o", file, "--description", "mine"
    )
    assert result.stdout.startswith("wrote ")
    plan = Plan.lazy([(4, 12), (20, 29)], num_layers=32, description="mine")
    assert Plan.from_json(file) == plan

    shown = " ".join(avl("plan", "show", file).stdout.split())
    for part in ("4-12, 20-29", "gla", "mine", "layers 32", "4, 20; 5-12, 21-29 (17 layers)", plan.fingerprint()):
        assert part in shown
    assert "executed by this version" in shown
    assert Plan.from_json(avl("plan", "show", file, "--json").stdout) == plan
    assert avl("plan", "check", file, "--layers", 32).stdout.startswith("ok: valid, fits 32 decoder layers")
    assert avl("plan", "check", file).stdout.startswith("ok: valid, executed by this version")


def test_make_prints_without_a_file():
    for block in ("1-3", "1..3", "1:3", " 1 - 3 "):
        assert Plan.from_json(avl("plan", "make", "--lazy", block).stdout) == Plan.lazy([(1, 3)])
    assert Plan.from_json(avl("plan", "make", "--lazy", "1-3", "--mode", "vla").stdout).lazy_policy.mode == "vla"


def test_show_presets_and_plans_that_are_not_executed(tmp_path):
    assert "identity: nothing is left out" in avl("plan", "show", "identity").stdout
    (tmp_path / "prefill.json").write_text('{"version": 1, "prefill": {"keep": 0.5}}')
    shown = avl("plan", "show", tmp_path / "prefill.json").stdout
    assert "keep" in shown
    assert "not by this version" in shown


def test_plan_errors(tmp_path):
    file, bad, later = tmp_path / "plan.json", tmp_path / "bad.json", tmp_path / "later.json"
    Plan.lazy([(4, 12)], num_layers=16).to_json(file)
    bad.write_text("{")
    later.write_text('{"version": 1, "prefill": {"keep": 0.5}}')
    assert "neither a preset" in error_of("plan", "show", tmp_path / "plna.json")
    assert "did you mean" in error_of("plan", "check", tmp_path / "plna.json")
    assert "Fix:" in error_of("plan", "show", bad)
    assert "the model has 8. Fix:" in error_of("plan", "check", file, "--layers", 8)
    assert "Fix: add a section 'vision'" in error_of("plan", "check", later)
    assert "--lazy: no block was given. Fix:" in error_of("plan", "make")
    for wrong in ("4", "a-b", "4-", "4-12-20", "-1-3"):
        assert "write FIRST-LAST" in error_of("plan", "make", f"--lazy={wrong}")
    assert "has no lazy layer" in error_of("plan", "make", "--lazy", "4-4")
    assert "overlaps" in error_of("plan", "make", "--lazy", "1-4", "--lazy", "3-6")
    assert "leaves the model" in error_of("plan", "make", "--lazy", "1-4", "--layers", 4)
    assert "mode" in error_of("plan", "make", "--lazy", "1-4", "--mode", "gal")
    assert "cannot write the plan" in error_of("plan", "make", "--lazy", "1-4", "-o", tmp_path / "no" / "plan.json")


def test_usage_errors():
    for words in (["plan", "show"], ["plan", "check"], ["explain"], ["plan", "check", "identity", "--layers", "0"]):
        assert "Traceback" not in avl(*words, code=2).output


def test_debug_lets_errors_through():
    result = avl("plan", "show", "nowhere.json", "--debug", code=1)
    assert result.exit_code == 1
    assert isinstance(result.exception, avl_fx.AvlError)


# ---- avl explain -----------------------------------------------------------------------------------------------------


def test_explain_prints_the_table(factory):
    assert "avl_fx explain: Tiny" in avl("explain", "--factory", f"{factory}:make").stdout
    text = avl("explain", "-f", "my_models:own_loop").stdout  # the current folder is searched
    assert "1 prefill, 1 decode" in text


def test_explain_prints_json_and_dumps(factory, tmp_path):
    plan = tmp_path / "plan.json"
    Plan.lazy([(0, 1)]).to_json(plan)
    result = avl("explain", "-f", f"{factory}:make", "-p", plan, "--json", "--dump", tmp_path / "out")
    data = json.loads(result.stdout)
    assert [site["action"] for site in data["sites"]] == ["anchor", "lazy (anchor 0)"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == data
    assert (tmp_path / "out" / "graph_000_prefill_after.py").exists()
    result = avl("explain", "-f", f"{factory}:make", "--front-door", "avl_fx.compile", "--json")
    assert json.loads(result.stdout)["front_door"] == "avl_fx.compile"


def test_explain_that_stopped_early(factory):
    assert "keys are gone. Fix: start again." in avl("explain", "-f", f"{factory}:stopping", code=1).stdout


def test_explain_errors(factory, tmp_path):
    for wrong in ("my_models", "my_models:", ":make", "make"):
        assert "must be module:function" in error_of("explain", "-f", wrong)
    assert "there is no module 'no_models'" in error_of("explain", "-f", "no_models:make")
    assert "there is no file 'no_models.py'" in error_of("explain", "-f", "no_models.py:make")
    assert "did you mean 'make'?" in error_of("explain", "-f", f"{factory}:mak")
    assert "has no function 'number'" in error_of("explain", "-f", f"{factory}:number")
    assert "must return (model, inputs), it returned Tiny" in error_of("explain", "-f", f"{factory}:no_tuple")
    assert "inputs: none were given" in error_of("explain", "-f", f"{factory}:no_inputs")
    assert "hold 'plan'" in error_of("explain", "-f", f"{factory}:clash")
    assert "did you mean 'avl_fx.compile'?" in error_of(
        "explain", "-f", f"{factory}:make", "--front-door", "avl_compile"
    )
    assert "neither a preset" in error_of("explain", "-f", f"{factory}:make", "--plan", "nowhere.json")
    Plan.lazy([(0, 3)]).to_json(tmp_path / "deep.json")
    assert "2 decoder layers" in error_of("explain", "-f", f"{factory}:make", "--plan", "deep.json")
    (tmp_path / "file").write_text("")
    assert "cannot write to" in error_of("explain", "-f", f"{factory}:make", "--dump", "file")


def test_errors_that_are_not_ours_take_one_line_too(factory):
    assert "KeyError: " in error_of("explain", "-f", f"{factory}:raises")
    for where in ("broken:make", "broken.py:make"):
        assert "ModuleNotFoundError: No module named 'no_such_module_anywhere'" in error_of("explain", "-f", where)
    result = avl("explain", "-f", f"{factory}:raises", "--debug", code=1)
    assert isinstance(result.exception, KeyError)


def test_entry_point_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", "from avl_fx.cli import app; app()", "plan", "check", "nowhere.json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: plan: 'nowhere.json' is neither a preset")
    assert done.stderr.count("\n") == 1
