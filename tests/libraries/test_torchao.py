"""Quantised weights: logits under a plan are those of the float weights that they stand for."""

import pytest
from torch import nn

from tests.e2e._doors import largest
from tests.libraries._plans import CASES, decoder_linears, run

pytestmark = pytest.mark.libraries
TOLERANCE = 1e-3


def quantised(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in decoder_linears(model))
    return model


def dequantised(model):
    for module in decoder_linears(quantised(model)).values():
        assert type(module.weight) is not nn.Parameter, "it was quantised"
        module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_weights_they_stand_for(case):
    assert largest(run(quantised, case), run(dequantised, case)) < TOLERANCE
