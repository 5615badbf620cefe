"""A partitioned cache that another process loads: its rows have moved, and nobody has partitioned anything there."""

import subprocess
import sys

import torch
from transformers import DynamicCache

from avl_fx import Plan
from tests.e2e._doors import FLOAT32_TOLERANCE, through
from tests.zoo import ZOO

LOAD = """
import sys, torch
from avl_fx import Plan
from tests.e2e.test_saved_cache import compiled, step
from tests.zoo import ZOO
model = ZOO["llava"].make()
cache = torch.load(sys.argv[1], weights_only=False)
length = cache.get_seq_length() - 5
cache.crop(-5)
with compiled(model, Plan()):
    torch.save(step(model, cache, 40, length + 1), sys.argv[2])
"""


def compiled(model, plan):
    return through("avl_fx.compile", model, compiler="eager", plan=plan)


@torch.no_grad()
def step(model, cache, token, length):
    mask = torch.ones(1, length, dtype=torch.long)
    return model(input_ids=torch.tensor([[token]]), attention_mask=mask, past_key_values=cache, use_cache=True).logits


def test_a_loaded_cache_is_cropped_in_the_order_in_which_it_was_fed(tmp_path):
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=1)
    length = inputs["input_ids"].shape[1]
    mine, plain = (DynamicCache(config=model.config.get_text_config()) for _ in range(2))
    with torch.no_grad():
        model(**inputs, past_key_values=plain, use_cache=True)
        for number in range(3):
            step(model, plain, 20 + number, length + 1 + number)
        with compiled(model, Plan.avl(0.3, 0.5, 3, text=0.4, text_minimum=2)):
            model(**inputs, past_key_values=mine, use_cache=True)
            for number in range(8):
                step(model, mine, 20 + number, length + 1 + number)
    saved, answered = tmp_path / "cache.pt", tmp_path / "logits.pt"
    torch.save(mine, saved)
    with compiled(model, Plan()):
        mine.crop(-5)
        expected = step(model, mine, 40, length + 4)
    subprocess.run([sys.executable, "-c", LOAD, saved, answered], check=True, timeout=240)
    assert (torch.load(answered) - expected).abs().max() <= FLOAT32_TOLERANCE
    # The first layer's keys tell which tokens are left: they do not depend on what was read.
    step(model, plain, 40, length + 4)
    assert torch.allclose(mine.layers[0].keys.sum(2), plain.layers[0].keys.sum(2), atol=1e-3)
