"""The catalogue of planted bugs stays applicable while the passes change."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from tests.mutations._catalogue import MUTATIONS, Mutation
from tests.mutations._run import ROOT

PASSES = (
    *("find_attention", "softmax_pattern", "unrepeat", "locate_modalities", "share_queries", "drop_keys"),
    *("partition_modalities", "lower"),
)
OTHERS = ("finish_outputs", "verify", "rewrite", "nodes", "dropped_keys", "runtime", "partition", "partition_runtime")


def identify(mutation: Mutation) -> str:
    return f"{mutation.area}-{mutation.name}".replace(" ", "_")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=identify)
def test_the_patch_applies_once_and_makes_python(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1
    changed = source.replace(mutation.old, mutation.new)
    assert changed != source
    if mutation.file.endswith(".py"):
        ast.parse(changed)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=identify)
def test_its_tests_exist(mutation: Mutation) -> None:
    files = [argument for argument in mutation.tests if argument.startswith("tests/")]
    assert files
    assert all((ROOT / file).is_file() for file in files)


def option(mutation: Mutation, name: str) -> str:
    """What follows ``-k`` or ``-m`` in its arguments."""
    arguments = (*mutation.tests, "")
    return arguments[arguments.index(name) + 1] if name in arguments else ""


def holds(expression: str, true: Callable[[str], bool]) -> bool:
    """Whether ``expression``, as ``-k`` and ``-m`` take it, is true: words are asked for, what joins them is Python."""
    words = re.split(r"([\s()]+)", expression)
    known = [w if not w.strip(" ()") or w in ("and", "or", "not") else str(true(w)) for w in words]
    return eval("".join(known).strip() or "True")


def test_each_selects_a_test() -> None:
    """A selection that has lost its tests, because they were renamed, would notice nothing."""
    files = sorted({argument for m in MUTATIONS for argument in m.tests if argument.startswith("tests/")})
    command = [sys.executable, "-m", "tests.mutations._collect", *files]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    collected: dict[str, list[str]] = json.loads(said.splitlines()[-1])
    for mutation in MUTATIONS:
        there = tuple(m.split("::")[0] for m in mutation.tests if m.startswith("tests/"))
        words, marks = option(mutation, "-k").lower(), option(mutation, "-m")
        assert any(
            test.startswith(there) and holds(words, test.lower().__contains__) and holds(marks, has.__contains__)
            for test, has in collected.items()
        ), identify(mutation)


def test_every_pass_has_at_least_two() -> None:
    counted = Counter(m.area for m in MUTATIONS)
    assert all(counted[name] >= 2 for name in (*PASSES, *OTHERS)), counted


def test_names_are_unique_within_a_pass() -> None:
    assert len({(m.file, m.name) for m in MUTATIONS}) == len(MUTATIONS)
