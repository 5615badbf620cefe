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


def test_every_column_is_of_the_right_contender():
    line = verdict({"words": {"results": RESULTS}}).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["words", "80.0%"]
    assert cells[2:7] == ["0.0%", "", "50.0%", "-12.5%", "5.0%"]
    assert cells[7:10] == ["2.5%", "", ""]
    assert cells[10:12] == ["", ""], "nobody was asked with 30%"
    assert cells[12] == "+10.0 to strided (-0.1000 to FastV-like)"
    assert cells[13] == "+25.0 to strided (+0.0500 to FastV-like)"


def test_a_model_that_knows_nothing_loses_nothing_that_could_be_told():
    line = verdict({"captions": {"results": {name: result(0.0) for name in RESULTS}}}).splitlines()[-1]
    assert line.startswith("| captions | 0.0% |  |  |  |  |  |  |  |  |")
