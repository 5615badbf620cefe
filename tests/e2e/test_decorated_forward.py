"""A decorator around a forward that names no argument, as transformers has them from 5.24 on, changes nothing."""

import itertools
from functools import wraps

import pytest

from avl_fx import Plan
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import DOORS, through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

PLANS = {"lazy": Plan.lazy([(1, 3)], "vla"), "avl": Plan.avl(core=0.3, secondary=0.5, refresh=3, text=None)}
SYMBOLS = {"batch", "queries", "keys"}
"""Sizes that Dynamo names as it likes."""


def decorated(forward):
    @wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    return call


def compiled(zoo, door, plan):
    """What is said of each graph: its depth by the configuration, how it knows its images, and all about its sites."""
    model = zoo.make()
    with through(door, model, compiler="eager", plan=plan) as recorder:
        prefill_and_decode(model, zoo.inputs(model, 1), steps=1)
    return [
        (
            graph.expected_layers,
            graph.visual,
            [{fact: said for fact, said in site.to_dict().items() if fact not in SYMBOLS} for site in graph.sites],
        )
        for graph in recorder.graphs
    ]


@pytest.mark.parametrize(
    ("name", "door", "plan"),
    rest_in_matrix(
        [*itertools.product(("gemma3", "llava", "qwen2_5_vl", "internvl"), DOORS, PLANS)],
        [("gemma3", DOORS[0], "avl"), ("gemma3", DOORS[1], "lazy")],
        apart=True,
    ),
)
def test_nothing_changes(name, door, plan, monkeypatch):
    zoo = ZOO[name]
    plain = compiled(zoo, door, PLANS[plan])
    model = zoo.make()
    for part in {type(part) for part in (model, model.model, model.model.language_model)}:
        monkeypatch.setattr(part, "forward", decorated(part.forward))
    assert compiled(zoo, door, PLANS[plan]) == plain
    assert any(site["role"] == "decoder" for _, _, sites in plain for site in sites)
