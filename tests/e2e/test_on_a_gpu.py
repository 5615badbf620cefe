"""Whole models on a GPU: what holds on a CPU holds there, through Inductor, and under CUDA graphs.

The checks are those of `test_identity.py` and `test_avl.py`; the eager model and the oracle run on the GPU as well.
"""

import contextlib

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

import avl_fx
from avl_fx import Plan
from avl_fx.record import recording
from tests._gpu import DEVICE, NEEDS_GPU, plain_float32  # noqa: F401  (a fixture)
from tests.e2e import test_avl, test_identity, test_latent_attention
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.oracle import avl_oracle
from tests.zoo import ZOO
from tests.zoo._run import on, prefill_and_decode

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("plain_float32")]

IDENTITY = [
    ("llava", "torch.compile", "sdpa", "dynamic", "float32"),
    ("llava", "torch.compile", "sdpa", "static", "bfloat16"),
    ("llava", "avl_fx.compile", "eager", "static", "float32"),
    ("qwen2_5_vl", "avl_fx.compile", "sdpa", "static", "float32"),
    ("qwen2_5_vl", "torch.compile", "sdpa", "dynamic", "bfloat16"),
]
AVL = [
    ("llava", "torch.compile", "dynamic", 3, "paper", "dense"),
    ("llava", "avl_fx.compile", "static", 3, "text", "lazy"),
    ("llava", "torch.compile", "dynamic", 1, "heavy", "dense"),
    ("qwen2_5_vl", "avl_fx.compile", "static", 3, "window", "dense"),
    ("qwen2_5_vl", "torch.compile", "dynamic", 3, "tight", "lazy"),
]


@pytest.mark.parametrize("case", IDENTITY, ids="-".join)
def test_identity_equals_eager(case):
    test_identity.check(*case, compiler="inductor", device=DEVICE)


@pytest.mark.parametrize("case", AVL, ids=test_avl.ids)
def test_partitioned_equals_oracle(case):
    test_avl.check(*case, compiler="inductor", device=DEVICE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("plan", ["identity", "partitioned"])
def test_latents_are_read_as_they_lie(plan, cache):
    settings, steps = test_latent_attention.SHARES, 8
    model = test_latent_attention.make().to(DEVICE)
    inputs = on(DEVICE, ZOO["llava"].inputs(model, batch=3))
    expected = prefill_and_decode(model, inputs, cache, steps=steps)
    tokens, chosen = expected.tokens, Plan.identity()
    if plan == "partitioned":
        dense, chosen = expected, Plan.avl(**settings, text=None)
        with avl_oracle(model, ZOO["llava"].visual_positions(model, inputs), text=1.0, **settings):
            expected = prefill_and_decode(model, inputs, cache, steps=steps, tokens=tokens)
        assert largest(expected, dense) > 10 * FLOAT32_TOLERANCE
    with through("avl_fx.compile", model, plan=chosen) as recorder:
        got = prefill_and_decode(model, inputs, cache, steps=steps, tokens=tokens)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert all(site.latent for site in test_latent_attention.steps(recorder))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("plan", ["identity", "partitioned"])
def test_cuda_graphs(name, plan):
    """`reduce-overhead` on a static cache: each step is replayed, and what is outside of the graph still happens.

    The prompt runs eagerly, so a partition starts late; several refreshes move rows between replays.
    """
    zoo, settings = ZOO[name], {"core": 0.3, "secondary": 0.5, "refresh": 3}
    model = zoo.make().to(DEVICE)
    inputs = on(DEVICE, zoo.inputs(model, batch=3))
    visual = zoo.visual_positions(model, inputs)
    text, prompt = model.config.get_text_config(), inputs["input_ids"].shape[1]
    steps = 16
    positions = inputs["attention_mask"].sum(1, keepdim=True)

    @torch.no_grad()
    def run(forward, around):
        cache = StaticCache(config=text, max_cache_len=prompt + steps)
        model.forward(**inputs, past_key_values=cache, use_cache=True)
        # As `generate` prepares it for a static cache: of one size at every step.
        mask = torch.zeros(3, prompt + steps, dtype=torch.long, device=DEVICE)
        mask[:, :prompt] = inputs["attention_mask"]
        logits = []
        with around:
            for step in range(steps):
                mask[:, prompt + step] = 1
                token = torch.full((3, 1), 10 + step, device=DEVICE)
                torch.compiler.cudagraph_mark_step_begin()
                out = forward(
                    input_ids=token,
                    attention_mask=mask,
                    position_ids=positions + step,
                    past_key_values=cache,
                    use_cache=True,
                )
                logits.append(out.logits[:, -1].clone())
        return logits

    expected = run(model.forward, contextlib.nullcontext())
    chosen, around = Plan.identity(), contextlib.nullcontext()
    if plan == "partitioned":
        dense, around = expected, avl_fx.modality_ids(visual)
        chosen = Plan.avl(**settings, text=None)
        expected = run(model.forward, avl_oracle(model, visual, text=1.0, **settings))
        assert largest(expected, dense) > 10 * FLOAT32_TOLERANCE
    torch._dynamo.reset()
    counters.clear()
    options = {"plan": chosen, "mode": "reduce-overhead", "strict": True}
    with recording() as recorder:
        got = run(torch.compile(model.forward, backend="avl", options=options), around)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert counters["inductor"]["cudagraph_skips"] == 0
    recorded = counters["inductor"]["cudagraph_recorded_non_static_inputs"]
    assert 0 < recorded < 2 * zoo.decoder_layers, "tokens, mask, positions and ranges are copied; no cache is"
    sites = [site for graph in decoder_graphs(recorder) for site in decoder_sites(graph)]
    assert len(sites) == zoo.decoder_layers, "one graph serves every step"
    assert all(("partitioned" in site.action) == (plan == "partitioned") for site in sites)
    torch._dynamo.reset()
