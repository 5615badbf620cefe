"""Caches that keep keys in another form and hand copies out: every layer is dense, in the prompt and in each step.

Half of a plan would be neither the model's answer nor the plan's: a dense prompt, and steps whose layers inherit.
"""

import itertools

import pytest
import torch
from transformers import Cache, QuantizedCache, cache_utils
from transformers.cache_utils import QuantizedLayer

from avl_fx import Plan
from avl_fx.passes.site import Reason, Status
from tests import zoo
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import DOORS, FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.zoo._run import prefill_and_decode

ZOO = zoo.get("llava")
STEPS = 10
BLOCKS = [(0, ZOO.decoder_layers - 1)]
PLANS = {
    "identity": Plan.identity(),
    "avl": Plan.avl(core=0.3, secondary=0.5, refresh=3, text=None),
    **{mode: Plan.lazy(BLOCKS, mode) for mode in ("gla", "vla", "vla_scores")},
}


class Rounded(QuantizedLayer):
    """The newest keys as they are, the others in 8 bits: as HQQ and Quanto have it, and traceable."""

    def _quantize(self, tensor, axis):
        return (tensor * 16).round().clamp(-128, 127).to(torch.int8)

    def _dequantize(self, q_tensor):
        return q_tensor.float() / 16


def fp8(model):
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("transformers has had caches in fp8 only since this layer")
    return QuantizedCache("fp8", model.config.get_text_config())


def rounded(model):
    return Cache(layers=[Rounded(residual_length=8) for _ in range(ZOO.decoder_layers)])


CACHES = {"fp8": fp8, "rounded": rounded}


@pytest.mark.parametrize("door", rest_in_matrix(DOORS, DOORS[:1]))
@pytest.mark.parametrize(
    ("plan", "cache"),
    rest_in_matrix(
        [*itertools.product(PLANS, CACHES)],
        [("gla", "fp8"), ("gla", "rounded"), ("vla_scores", "fp8"), ("avl", "rounded")],
        apart=True,
    ),
)
def test_everything_is_dense(plan, cache, door):
    model, cache = ZOO.make(), CACHES[cache]
    inputs = ZOO.inputs(model, batch=2)
    dense = prefill_and_decode(model, inputs, cache(model), STEPS)
    with through(door, model, plan=PLANS[plan], compiler="eager") as recorder:
        got = prefill_and_decode(model, inputs, cache(model), STEPS, tokens=dense.tokens)
    assert largest(got, dense) <= FLOAT32_TOLERANCE
    sites = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph)]
    assert {site.queries == 1 for site in sites} == {False, True}, "prompts and steps are compiled"
    refused = {str(site.reason) for site in sites if site.status is Status.REFUSED}
    wanted = {"identity": set(), "avl": {Reason.NO_CACHE}}.get(plan, {Reason.KEYS_ESCAPE, Reason.NOT_THE_CACHE})
    assert refused == wanted
