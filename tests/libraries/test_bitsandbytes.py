"""Models loaded in 4 bits: logits under a plan are those of the float weights that they stand for."""

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from tests.e2e._doors import FLOAT32_TOLERANCE, largest
from tests.libraries._plans import CASES, decoder_linears, run

pytestmark = pytest.mark.libraries


@pytest.fixture
def quantised(tmp_path):
    """Loads a model as its user would, in 4 bits."""

    def load(model):
        model.save_pretrained(tmp_path)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
        return loaded.eval().requires_grad_(False)

    return load


def dequantised(model):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert {name for name, _ in layers} >= set(decoder_linears(model))
    for name, module in layers:
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight = nn.Parameter(dequantize_4bit(module.weight.data, module.weight.quant_state).float())
        plain.bias = module.bias
        model.set_submodule(name, plain)
    return model.requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_weights_they_stand_for(case, quantised):
    got, expected = run(quantised, case), run(lambda model: dequantised(quantised(model)), case)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
