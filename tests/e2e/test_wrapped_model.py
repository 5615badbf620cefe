"""A model inside of a wrapper is found by every entry, whichever of the two `generate` and training call.

`Wrapper` does as PEFT's: it passes on what it does not know itself, its `generate` is that of the model inside, and its
forward calls the forward of the model inside, without its hooks. `Closed` does as DistributedDataParallel: it knows the
model's call alone.
"""

import itertools

import pytest
import torch
from torch import nn

import avl_fx
from avl_fx import Plan
from avl_fx.record import recording
from avl_fx.region import find_regions
from avl_fx.regions import compiled_plan
from avl_fx.spliced_rows import SplicedRows
from avl_fx.wrappers import unwrapped, wrapping
from tests.e2e._covering import rest_in_matrix
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_graphs, decoder_sites, largest, through
from tests.oracle import avl_oracle, lazy_oracle
from tests.zoo import ZOO
from tests.zoo._run import prefill, prefill_and_decode

SHARES = {"core": 0.3, "secondary": 0.5, "refresh": 3}
STEPS = 5
EAGER = {"compiler": "eager", "strict": True}


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, *args, **kwargs):
        return self.inside.forward(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)


class Closed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


@pytest.fixture
def llava():
    torch._dynamo.reset()
    zoo = ZOO["llava"]
    model = zoo.make()
    inputs = zoo.inputs(model, batch=2)
    return model, inputs, zoo.visual_positions(model, inputs)


@pytest.mark.parametrize("depth", rest_in_matrix([1, 2], [2]))
def test_a_partitioned_plan_reaches_the_model_inside(llava, depth):
    model, inputs, visual = llava
    wrapped = model
    for _ in range(depth):
        wrapped = Wrapper(wrapped)
    tokens = prefill_and_decode(model, inputs, "dynamic", STEPS).tokens
    with avl_oracle(model, visual, **SHARES, text=1):
        expected = prefill_and_decode(model, inputs, "dynamic", STEPS, tokens=tokens)
    with through("avl_fx.compile", wrapped, compiler="eager", plan=Plan.avl(**SHARES, text=None)):
        got = prefill_and_decode(wrapped, inputs, "dynamic", STEPS, tokens=tokens)
    assert largest(got, expected) < FLOAT32_TOLERANCE


CALLED = {"wrapper": lambda wrapped: wrapped, "inside": unwrapped}


@pytest.mark.parametrize(
    ("wrapper", "called"),
    rest_in_matrix([*itertools.product((Wrapper, Closed), CALLED)], [(Wrapper, "inside"), (Closed, "wrapper")], True),
)
def test_visual_positions_are_known_whichever_is_called(llava, wrapper, called, monkeypatch):
    model, inputs, _ = llava
    monkeypatch.setattr(SplicedRows, "watch", lambda decoder: ())  # it is the token ids that tell
    plan = Plan.lazy([(0, 3)], "vla_scores")
    avl_fx.compile(model, plan, options=EAGER)
    expected = prefill(model, inputs)
    avl_fx.uncompile(model)
    wrapped = avl_fx.compile(wrapper(model), plan, options=EAGER)
    assert torch.equal(prefill(CALLED[called](wrapped), inputs), expected)


@pytest.mark.parametrize("wrapper", [Wrapper, Closed])
def test_wrapper_and_model_are_one_to_what_is_known_of_them(llava, wrapper):
    model, _, _ = llava
    wrapped, plan = wrapper(model), Plan.lazy([(0, 1)])
    avl_fx.compile(wrapped, plan)
    assert compiled_plan(model) == compiled_plan(wrapped) == plan
    assert [r.name for r in find_regions(wrapped)] == ["inside.model.language_model", "inside.model.vision_tower"]
    avl_fx.uncompile(model)
    assert compiled_plan(wrapped) is None
    for module in (*wrapped.modules(),):
        assert module._compiled_call_impl is None
        assert not module._forward_pre_hooks


def test_a_module_of_several_parts_is_no_wrapper(llava):
    model, _, _ = llava
    both = Wrapper(model)
    both.head = nn.Linear(2, 2)
    assert wrapping(both) == (both,)
    assert wrapping(model) == (model,)
    plain = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    assert unwrapped(plain) is plain, "nothing inside tells its decoder apart"


@pytest.mark.matrix
def test_explain_sees_the_calls_of_the_model_inside(llava):
    model, inputs, _ = llava
    plan = Plan.avl(**SHARES)
    report = avl_fx.explain(Wrapper(model), plan, front_door="avl_fx.compile", **inputs)
    alone = avl_fx.explain(model, plan, front_door="avl_fx.compile", **inputs)
    assert [f.phase for f in report.forwards] == [f.phase for f in alone.forwards] == ["prefill", "decode", "decode"]
    assert report.kv == alone.kv
    assert report.decode_reads == alone.decode_reads


def test_explain_says_what_to_compile_when_generate_passes_the_wrapper_by(llava):
    model, inputs, _ = llava
    report = avl_fx.explain(Wrapper(model), Plan.lazy([(0, 1)]), **inputs)
    assert not report.forwards
    (line,) = report.advice
    assert "LlavaForConditionalGeneration inside of it: compile that one" in line


@pytest.fixture
def small_buckets(monkeypatch):
    """Gradients of about a layer fill a bucket of DistributedDataParallel, as those of a layer of any real size do."""
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 50_000)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield 60_000
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="a build of torch without torch.distributed")
def test_a_lazy_plan_reaches_across_the_buckets_of_distributed_training(llava, small_buckets):
    """Dynamo splits graphs where a bucket is full, so that gradients are sent while others are still computed."""
    model, inputs, _ = llava
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    # Queries and keys of lazy layers are used by nothing.
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    wrapped.bucket_bytes_cap = small_buckets

    def step():
        model.zero_grad()
        logits = wrapped(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
        logits.square().mean().backward()
        return logits.detach(), model.model.language_model.layers[1].self_attn.q_proj.weight.grad.clone()

    with lazy_oracle(model, [(1, 3)], ZOO["llava"].decoder_prefix):
        expected = step()
    with recording() as recorder:
        avl_fx.compile(wrapped, Plan.lazy([(1, 3)]), options={"compiler": "aot_eager", "strict": True})
        got = step()
    assert [len(decoder_sites(graph)) for graph in decoder_graphs(recorder)] == [4]
    assert largest([got[0]], [expected[0]]) < FLOAT32_TOLERANCE
    torch.testing.assert_close(got[1], expected[1], atol=1e-6, rtol=1e-3)
