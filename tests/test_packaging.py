"""What gets installed, under which names, and which way imports run."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import avl_fx

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"avl_fx": "avl_fx", "passes": "avl_fx.passes", "kernels": "avl_fx.kernels"}  # in the repository -> installed
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def sources() -> dict[str, Path]:
    """Path inside the installed package -> source file, for every Python file that belongs to the distribution."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            found[str(Path(*package.split(".")) / file.relative_to(ROOT / folder))] = file
    return found


SOURCES = sources()


def test_every_folder_is_listed():
    folders = {".".join(Path(installed).parent.parts) for installed in SOURCES}
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders), "correct [tool.setuptools] packages in pyproject.toml"
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in FOLDERS.items()}


def test_every_folder_is_a_package():
    for installed, file in SOURCES.items():
        assert (file.parent / "__init__.py").exists(), f"{installed}: its folder has no __init__.py"


def test_entry_point_resolves():
    (entry,) = {e.value: e for e in entry_points(group="torch_dynamo_backends", name="avl")}.values()
    assert entry.load() is avl_fx.avl_backend
    assert "avl" in torch.compiler.list_backends()


def test_subpackages_come_from_the_top_of_the_repository():
    import avl_fx.kernels
    import avl_fx.passes

    assert Path(avl_fx.passes.__file__).parent == ROOT / "passes"
    assert Path(avl_fx.kernels.__file__).parent == ROOT / "kernels"


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"  # a copy: building leaves files behind
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run(build, cwd=tree, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    (metadata,) = {name.split("/")[0] for name in names} - {"avl_fx"}
    assert metadata.endswith(".dist-info")
    compiled = {
        f"avl_fx/{path.relative_to(ROOT)}" for kind in ("cpp", "h") for path in ROOT.glob(f"kernels/**/*.{kind}")
    }
    assert compiled, "C++ kernels are built from their sources on the user's machine"
    assert {name for name in names if name.startswith("avl_fx/")} == {*SOURCES, *compiled, "avl_fx/py.typed"}


# ---- which way imports run -------------------------------------------------------------------------------------------

# Layer -> what it may import besides itself and the standard library; CONTRIBUTING.md says why.
ALLOWED = {
    "avl_fx.kernels": ("torch", "triton"),
    "avl_fx.passes": ("torch", "avl_fx.kernels", "avl_fx.plan", "avl_fx.policies", "avl_fx.errors"),
}
# Private names without a public twin, in place for years. All others belong to avl_fx/_compat.py.
SETTLED = ("torch._ops", "torch.ops._c10d_functional", "torch.utils._pytree")


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that a module imports, and the dotted names under `torch` and `transformers` that it mentions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.startswith(("torch.", "transformers.")) and dotted.replace(".", "").isidentifier():
                names.add(dotted)
    return names


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("installed", SOURCES)
def test_imports_run_one_way(installed):
    names = imported(ast.parse(SOURCES[installed].read_text(encoding="utf-8")))
    assert not [name for name in names if name.startswith(".")], "write imports in full: from avl_fx.passes..."
    layer = next((layer for layer in ALLOWED if installed.startswith(layer.replace(".", "/"))), None)
    if layer:
        foreign = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
        assert not {name for name in foreign if not within(name, (layer, *ALLOWED[layer]))}


@pytest.mark.parametrize("installed", [name for name in SOURCES if name != "avl_fx/_compat.py"])
def test_private_names_stay_in_compat(installed):
    names = imported(ast.parse(SOURCES[installed].read_text(encoding="utf-8")))
    libraries = [name for name in names if name.split(".")[0] in ("torch", "transformers")]
    private = [name for name in libraries if any(re.match("_(?!_)", part) for part in name.split("."))]
    assert not [name for name in private if not within(name, SETTLED)]
