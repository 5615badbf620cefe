"""The choice of core among secondary: against Python's own sort, for several layers at once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_fx.kernels.partition.native import reselect_native
from avl_fx.kernels.reselect import reselect, reselect_reference
from tests._compiler import needs_compiler

Implementation = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    layers: int = 3
    batch: int = 3
    groups: int = 1
    core: float = 0.3
    secondary: float = 0.6
    ragged: bool = True
    values: int = 5
    """Different scores: with few of them ties happen."""


CASES = {
    "shared scores": Case(),
    "scores of each head": Case(groups=2),
    "many scores": Case(values=10_000),
    "all rows alike": Case(ragged=False, groups=2),
    "secondary is everything": Case(core=0.5, secondary=1.0),
    "one layer": Case(layers=1, batch=1),
    "ties alone": Case(values=1),
}


def operands(case: Case, visual: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """What `reselect` takes; rows of a batch have different numbers of visual tokens where it is ragged."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    counts = [chance.randint(0, visual) if case.ragged and row else visual for row in range(case.batch)]
    keys = visual + 4
    slots = torch.full((case.batch, visual), -1)
    for row, count in enumerate(counts):
        slots[row, :count] = torch.tensor(sorted(chance.sample(range(keys), count)), dtype=torch.int64)
    core, secondary = (torch.tensor([int(share * count) for count in counts]) for share in (case.core, case.secondary))
    shape = (case.layers, case.batch, case.groups)
    scores = torch.randint(0, case.values, (*shape, keys), generator=generator).float()
    tokens = torch.rand(*shape, visual, generator=generator).argsort(-1)
    most = int(torch.minimum(core, secondary - core).max())
    return scores, slots, tokens, core, secondary, int(secondary.max()), most


def check(case: Case, visual: int, implementation: Implementation, seed: int = 0) -> None:
    """``implementation`` equals the reference; where none may enter, nobody asks."""
    scores, slots, tokens, core, secondary, width, most = operands(case, visual, seed)
    if most == 0:
        return
    got, expected = tokens.clone(), tokens.clone()
    result = implementation(scores, slots, got, core, secondary, width, most)
    wanted = reselect_reference(scores, slots, expected, core, secondary, width, most)
    for mine, theirs in zip((*result, got), (*wanted, expected), strict=True):
        assert torch.equal(mine, theirs)


def check_nan(implementation: Implementation) -> None:
    """NaN counts as the best score: the rows stay rows that are there."""
    for spoilt in (slice(None), slice(3, 7)):
        scores, *rest = operands(Case(groups=2), 40)
        scores[..., spoilt] = torch.nan
        slots, tokens, *numbers = rest
        got, expected = tokens.clone(), tokens.clone()
        result = implementation(scores, slots, got, *numbers)
        wanted = reselect_reference(scores, slots, expected, *numbers)
        assert all(map(torch.equal, (*result, got), (*wanted, expected)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(sorted(CASES)),
    st.integers(1, 40),
)
def test_the_best_are_core(seed: int, name: str, visual: int) -> None:
    scores, slots, tokens, core, secondary, width, most = operands(CASES[name], visual, seed)
    if most == 0:
        return
    before = tokens.clone()
    source, target = reselect(scores, slots, tokens, core, secondary, width, most)
    assert source.shape == target.shape == (*tokens.shape[:3], 2 * most)
    for layer, row, group in torch.cartesian_prod(*map(torch.arange, tokens.shape[:3])).tolist():
        kept, count = int(core[row]), int(secondary[row])
        old, new, slot = (x.tolist() for x in (before[layer, row, group], tokens[layer, row, group], slots[row]))
        score = {token: float(scores[layer, row, group, slot[j]]) for j, token in enumerate(old[:count])}
        assert set(new[:kept]) == set(sorted(old[:count], key=lambda token: (-score[token], token))[:kept])
        pairs = zip(target[layer, row, group].tolist(), source[layer, row, group].tolist(), strict=True)
        moved = {to: of for to, of in pairs if to >= 0}
        lies = dict(zip(slot[:count], old[:count], strict=True))
        assert new[:count] == [lies[moved.get(s, s)] for s in slot[:count]], "the tokens are where the rows went"
        assert new[count:] == old[count:]
        # The first that leaves changes places with the first that enters.
        leaving = sorted(s for s in moved if slot.index(s) < kept)
        entering = sorted(s for s in moved if slot.index(s) >= kept)
        assert [moved[s] for s in leaving] == entering
        assert [moved[s] for s in entering] == leaving


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(CASES)), st.integers(1, 40))
def test_the_cpu_kernel_chooses_alike(seed: int, name: str, visual: int) -> None:
    scores, slots, tokens, core, secondary, width, most = operands(CASES[name], visual, seed)
    if most == 0:
        return
    own = [its_tokens.clone() for its_tokens in tokens]
    source, target = reselect(scores, slots, tokens, core, secondary, width, most)
    moved = reselect_native([*scores], slots, own, core, secondary, 2 * most)
    assert moved is not None
    assert torch.equal(torch.stack(own), tokens)
    for at in itertools.product(*map(range, tokens.shape[:3])):
        mine, theirs = (
            {(to, of) for to, of in zip(t[at].tolist(), s[at].tolist(), strict=True) if to >= 0}
            for s, t in ((source, target), moved)
        )
        assert mine == theirs


@pytest.mark.parametrize("case", CASES)
def test_layers_do_not_meet(case: str) -> None:
    """Together they choose as each would alone."""
    scores, slots, tokens, *numbers = operands(CASES[case], 30)
    alone = tokens.clone()
    together = reselect(scores, slots, tokens, *numbers)
    for layer in range(len(tokens)):
        one = slice(layer, layer + 1)
        its = reselect(scores[one], slots, alone[one], *numbers)
        assert all(torch.equal(a[0], b[layer]) for a, b in zip(its, together, strict=True))
    assert torch.equal(alone, tokens)


def test_nan_counts_as_the_best() -> None:
    check_nan(reselect)
