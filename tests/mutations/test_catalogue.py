"""The catalogue of planted bugs stays applicable while the passes change."""

from __future__ import annotations

import ast
from collections import Counter

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


def test_every_pass_has_at_least_two() -> None:
    counted = Counter(m.area for m in MUTATIONS)
    assert all(counted[name] >= 2 for name in (*PASSES, *OTHERS)), counted


def test_names_are_unique_within_a_pass() -> None:
    assert len({(m.file, m.name) for m in MUTATIONS}) == len(MUTATIONS)
