"""`docs/models.md` says what the models answer."""

import pytest

from tests.families import ALL, UNAVAILABLE
from tests.families._ask import KEPT, QUESTIONS, partitioned
from tests.families._table import read, write

SAID = read()


@pytest.mark.families
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", sorted(ALL))
def test_the_page_says_what_happens(name, question):
    assert QUESTIONS[question](ALL[name]) == SAID[name][question]


def test_features_that_enter_behind_the_filter_and_experts():
    """Both in one decoder of four layers."""
    assert partitioned(ALL["qwen3_vl_moe"], "compact", keep=KEPT) == "exact"


@pytest.mark.families
def test_layers_without_a_cache_read_what_is_left_of_another():
    """Of Gemma 3n's decoder the last two layers keep no keys."""
    zoo = ALL["gemma3n"]
    assert zoo.shares
    said = partitioned(zoo, "compact", text=0.5)
    assert said.startswith(f"{zoo.attention_kinds.count('full')} of {zoo.decoder_layers}: ")


def test_the_page_has_every_model_and_no_failure():
    assert {*ALL} <= {*SAID}
    assert len(SAID) == len(ALL) + len(UNAVAILABLE)
    assert not [said for row in SAID.values() for said in row.values() if said.startswith("FAILS")]


def test_what_is_written_is_read(tmp_path):
    row = dict.fromkeys(QUESTIONS, "exact") | {next(iter(QUESTIONS)): "3 of 5: a reason; another: with a colon"}
    write({"one": row, "two": dict.fromkeys(QUESTIONS, "exact")}, tmp_path / "page.md")
    assert read(tmp_path / "page.md") == {"one": row, "two": dict.fromkeys(QUESTIONS, "exact")}
