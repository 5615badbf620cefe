"""The table of what was hoped for says what the reports say."""

from benchmarks.eval.verdict import verdict


def result(score, divergence=0.0):
    return {"score": {"mean": score}, "divergence": divergence}


RESULTS = {
    "dense": result(0.8),
    "A-VL 50%": result(0.8),
    "A-VL 10%": result(0.6, 0.2),
    "A-VL, 8 rows 10%": result(0.75, 0.05),
    "random 10%": result(0.3, 0.9),
    "strided 10%": result(0.5, 0.8),
    "FastV-like 10%": result(0.4, 0.1),
    "down-sampled 10%": result(0.2, 0.7),
    "lazy 15, gla, random blocks": result(0.0),
    "A-VL 50% and lazy 15, vla_scores": result(0.1),
    "lazy 15, gla": result(0.4),
    "lazy 15, vla": result(0.9),
    "lazy 15, vla_scores": result(0.76),
    "tuned, dense": result(0.9),
    "tuned lazy 15, gla, other pictures": result(0.0),
    "tuned lazy 15, gla": result(0.78),
    "A-VL 50% and tuned lazy 15, gla": result(0.3),
    "other pictures": result(0.99, 0.0),
}


def rows_of(results, name):
    """Cells of the rows called ``name``, without it, one list a table."""
    lines = verdict({name: {"results": results}}).splitlines()
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines if line.startswith(f"| {name} |")]


def test_every_column_is_of_the_right_contender():
    lost, ahead = rows_of(RESULTS, "words")
    assert lost[0] == "80.0%"
    assert lost[1:7] == ["0.0%", "", "", "50.0%", "-12.5%", "5.0%"]
    assert lost[7:] == ["2.5%", "", ""]
    assert ahead[:6] == [""] * 6, "no control was asked with 30%"
    assert ahead[6] == "+10.0 to strided (-0.1000 to FastV-like)"
    assert ahead[7] == "+25.0 to strided (+0.0500 to FastV-like)"
    assert ahead[8:] == [""] * 4, "nobody was asked who computes 10%"


def test_who_computes_as_much_is_held_against_controls_of_a_smaller_share():
    _, ahead = rows_of(RESULTS | {"A-VL 17%": result(0.7, 0.15), "random 30%": result(0.6, 0.01)}, "words")
    assert ahead == [
        *("", "", "", "+20.0 to random (+0.0100 to random)", "", ""),
        *("+10.0 to strided (-0.1000 to FastV-like)", "+25.0 to strided (+0.0500 to FastV-like)", ""),
        *("+20.0 to strided (-0.0500 to FastV-like)", "", ""),
    ]


def test_the_adapter_is_named_where_it_is_known():
    said = verdict({"words": {"results": RESULTS, "machine": {"adapter": "reader"}}})
    assert said.count("| words, reader |") == 2


def test_a_model_that_knows_nothing_loses_nothing_that_could_be_told():
    lost, _ = rows_of({name: result(0.0) for name in RESULTS}, "captions")
    assert lost == ["0.0%", *[""] * 9]
