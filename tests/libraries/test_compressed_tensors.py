"""Models in the format of compressed-tensors, whose linear layers Dynamo cannot trace: the decoder comes in pieces.
Logits are those of the float weights that the quantised ones stand for; lazy layers stay dense there.
"""

import pytest
from torch import nn

from tests.e2e._doors import FLOAT32_TOLERANCE, largest
from tests.libraries._plans import decoder_linears, run

pytestmark = pytest.mark.libraries


def quantised(model):
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    weights = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    scheme = QuantizationScheme(targets=[*decoder_linears(model)], weights=weights)
    config = QuantizationConfig(config_groups={"decoder": scheme}, quantization_status=QuantizationStatus.FROZEN)
    apply_quantization_config(model, config)
    for module in decoder_linears(model).values():
        module.weight_scale.data.copy_(module.weight.abs().amax(1, keepdim=True) / 127)
    return model.requires_grad_(False)


def dequantised(model):
    for name, module in decoder_linears(quantised(model)).items():
        plain = nn.Linear(module.in_features, module.out_features, bias=False)
        codes = (module.weight / module.weight_scale).round().clamp(-128, 127)
        plain.weight = nn.Parameter(codes * module.weight_scale, requires_grad=False)
        model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("case", ["identity", "avl"])
def test_logits_are_those_of_the_weights_they_stand_for(case):
    assert largest(run(quantised, case), run(dequantised, case)) <= FLOAT32_TOLERANCE
