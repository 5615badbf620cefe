"""Models with code of their own: plans reach the decoder inside, which is told what was spliced into its embeddings."""

import itertools
import logging

import pytest
import torch
from torch import nn
from transformers import CompileConfig, LogitsProcessorList

import avl_fx
from avl_fx import AVLCache, Contender, EvaluationBatch, EvaluationTask, Plan
from avl_fx.errors import CacheStateError, CaptureError
from avl_fx.record import recording
from avl_fx.region import find_regions
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_sites, largest, through
from tests.e2e._remote_code import BEFORE, LAYERS, LENGTH, REMOTE, TOKENS
from tests.oracle import avl_oracle, lazy_oracle
from tests.zoo._run import _Forced

STEPS = 7
SHARES = {"core": 0.3, "secondary": 0.5, "refresh": 3}
AVL = Plan.avl(**SHARES, text=None)
BLOCKS = [(0, LAYERS - 1)]
VLA = Plan.lazy(BLOCKS, "vla_scores")


def generate(model, inputs, tokens=None, steps=STEPS, **more):
    """Logits of the prompt's last row and of ``steps`` more, and all that `generate` returns."""
    forced = {} if tokens is None else {"logits_processor": LogitsProcessorList([_Forced(tokens, 0)])}
    settings = {"max_new_tokens": steps + 1, "do_sample": False, "disable_compile": True, "pad_token_id": 0}
    out = model.generate(**inputs, **{**settings, **more}, **forced, output_logits=True, return_dict_in_generate=True)
    return list(out.logits), out


def oracle(plan, remote, model, visual):
    if plan is AVL:
        return avl_oracle(model, visual, **SHARES, text=1.0, decoder_prefix=remote.layers)
    return lazy_oracle(model, BLOCKS, remote.layers, mode="vla_scores", visual=visual)


def language_model(remote, model):
    return model.get_submodule(remote.language_model)


CASES = [*itertools.product(REMOTE, ("avl", "vla_scores"), ("dynamic", "compact"))]
CHOSEN = [
    ("internvl_chat", "avl", "compact"),
    ("llava_llama", "vla_scores", "dynamic"),
    ("minicpm_v", "avl", "dynamic"),
]


@pytest.mark.parametrize(("name", "plan", "cache"), rest_in_matrix(CASES, CHOSEN, apart=True))
def test_equals_the_oracle(name, plan, cache):
    remote, plan = REMOTE[name], {"avl": AVL, "vla_scores": VLA}[plan]
    model = remote.make()
    inputs, visual = remote.prompts()
    dense, out = generate(model, inputs)
    tokens = out.sequences
    with oracle(plan, remote, model, visual):
        expected, _ = generate(model, inputs, tokens)
    more = {"past_key_values": AVLCache(plan, language_model(remote, model).config)} if cache == "compact" else {}
    with through("avl_fx.compile", model, compiler="eager", plan=plan) as recorder:
        got, _ = generate(model, inputs, tokens, **more)
    assert largest(got, expected) <= FLOAT32_TOLERANCE
    assert largest(expected, dense) > 100 * FLOAT32_TOLERANCE
    sites = [site for graph in recorder.graphs for site in decoder_sites(graph)]
    assert {site.layer for site in sites} == {*range(LAYERS)}
    assert not [site.reason for site in sites if site.reason is not None]


def test_what_the_user_says_wins():
    model = REMOTE["llava_llama"].make()
    inputs, visual = REMOTE["llava_llama"].prompts()
    dense, _ = generate(model, inputs, steps=0)
    with through("avl_fx.compile", model, compiler="eager", plan=VLA):
        with avl_fx.modality_ids(torch.zeros_like(visual)):
            told, _ = generate(model, inputs, steps=0)
        seen, _ = generate(model, inputs, steps=0)
    assert largest(told, dense) <= FLOAT32_TOLERANCE
    assert largest(seen, dense) > 100 * FLOAT32_TOLERANCE


class Adapted(nn.Module):
    """As PEFT wraps what is tuned: its own call ends in the forward of what it wraps."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)

    def forward(self, *args, **kwargs):
        return self.inside.forward(*args, **kwargs)


def test_what_generates_may_be_wrapped():
    remote = REMOTE["internvl_chat"]
    model = remote.make()
    inputs, visual = remote.prompts()
    with oracle(VLA, remote, model, visual):
        expected, out = generate(model, inputs, steps=1)
    model.language_model = Adapted(model.language_model)
    assert find_regions(model)[0].name == "language_model.inside.model"
    with through("avl_fx.compile", model, compiler="eager", plan=VLA):
        got, _ = generate(model, inputs, out.sequences, steps=1)
    assert largest(got, expected) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", rest_in_matrix(list(REMOTE), ["minicpm_v"]))
def test_generate_does_not_compile_past_it(name):
    """On GPUs `generate` compiles what generates, not what was handed to `avl_fx.compile`."""
    remote, plan = REMOTE[name], Plan.lazy(BLOCKS)
    model = remote.make()
    inputs, _ = remote.prompts()
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    with through("avl_fx.compile", model, compiler="eager", plan=plan):
        expected, _ = generate(model, inputs, steps=2, cache_implementation="static")
        with recording() as recorder:
            by_itself = {"compile_config": config, "disable_compile": False}
            got, _ = generate(model, inputs, steps=2, cache_implementation="static", **by_itself)
    assert largest(got, expected) == 0
    assert not recorder.graphs
    assert "get_compiled_call" not in vars(language_model(remote, model))


@pytest.mark.parametrize("name", rest_in_matrix(list(REMOTE), ["minicpm_v"]))
def test_explain_runs_their_generate(name):
    remote = REMOTE[name]
    model = remote.make()
    inputs, _ = remote.prompts()
    before = [dict(vars(module)) for module in model.modules()]
    report = avl_fx.explain(model, AVL, front_door="avl_fx.compile", new_tokens=3, **inputs)
    assert [forward.phase for forward in report.forwards] == ["prefill", "decode", "decode"]
    assert f"row 0: {BEFORE}-{BEFORE + TOKENS - 1} ({TOKENS} tokens)" in str(report)
    assert report.decoder.seen == dict.fromkeys(("prefill", "decode"), tuple(range(LAYERS)))
    assert not report.advice
    assert [dict(vars(module)) for module in model.modules()] == before
    assert not [module for module in model.modules() if module._forward_hooks]


def test_explain_of_a_forward_that_generate_goes_past():
    model = REMOTE["minicpm_v"].make()
    inputs, _ = REMOTE["minicpm_v"].prompts()
    with pytest.raises(CaptureError, match=r"its generate goes past it.*front_door='avl_fx.compile'"):
        avl_fx.explain(model, AVL, **inputs)
    model = REMOTE["internvl_chat"].make()
    inputs, _ = REMOTE["internvl_chat"].prompts()
    report = avl_fx.explain(model, AVL, **inputs)
    assert any("generate calls the decoder past it, where torch.compile sees nothing" in line for line in report.advice)
    with pytest.raises(TypeError, match="missing"):  # nobody takes it: the model's own words
        avl_fx.explain(REMOTE["llava_llama"].make(), AVL, front_door="avl_fx.compile", nonsense=inputs["input_ids"])


@pytest.mark.parametrize("name", rest_in_matrix(list(REMOTE), ["internvl_chat"]))
def test_calibration(name):
    remote = REMOTE[name]
    inputs, _ = remote.prompts()
    renamed = {"inputs": "input_ids"}
    batch = {"data": inputs} if name == "minicpm_v" else {renamed.get(key, key): t for key, t in inputs.items()}
    plan = avl_fx.calibrate(remote.make(), [batch], lazy_share=0.25, mode="vla", vision=True, progress=False)
    assert plan.num_layers == LAYERS
    assert len(plan.lazy_policy.lazy_layers) == 1
    assert 0 < plan.vision_policy.core < 1


def test_evaluation_on_a_compact_cache():
    """The configuration of the model does not tell the decoder's layers; that of the decoder does."""
    remote = REMOTE["internvl_chat"]
    model = remote.make()
    with pytest.raises(CacheStateError, match=r"does not say how many layers.*model.language_model.config"):
        AVLCache(AVL, model.config)
    inputs, _ = remote.prompts(batch=1)
    batches = [EvaluationBatch(inputs, [""])]
    task = EvaluationTask(batches, lambda tokens: [""] * len(tokens), max_new_tokens=2, name="words")
    found = avl_fx.evaluate(model, task, {"compact": Contender.of_plan(AVL, compact=True)}).results
    assert found["compact"].kv_share < found["dense"].kv_share == 1


def test_embeddings_that_nobody_knows_are_announced_once(caplog):
    caplog.set_level(logging.WARNING, logger="avl_fx")
    model = REMOTE["internvl_chat"].make().language_model
    embeds = model.get_input_embeddings()(torch.arange(1, LENGTH)[None]) * 2
    with through("avl_fx.compile", model, compiler="eager", plan=VLA), torch.no_grad():
        model(input_ids=torch.arange(1, LENGTH)[None])
        assert not caplog.records, "token ids: a prompt without images"
        for _ in range(2):
            model(inputs_embeds=embeds)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("model was given embeddings, and which of them are visual is not known")
    caplog.clear()
    with through("avl_fx.compile", model, compiler="eager", plan=Plan.lazy(BLOCKS)), torch.no_grad():
        model(inputs_embeds=embeds)
    assert not caplog.records, "mode gla does not ask"


def test_a_part_that_is_no_decoder_of_the_model_is_left_alone():
    """Two parts that generate, as where a model speaks, too: the one that embeds the model's tokens is its decoder."""
    llama = REMOTE["internvl_chat"].make().language_model

    class Speaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.talker, self.thinker = REMOTE["internvl_chat"].make().language_model, llama

    model = Speaks()
    assert [region.role for region in find_regions(model)] == ["model"]
    model.get_input_embeddings = llama.get_input_embeddings
    assert [(region.name, region.role) for region in find_regions(model)] == [("thinker.model", "decoder")]
