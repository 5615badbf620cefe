"""Every documented way to switch the backend on gives the eager tokens, and leaves the model as it was."""

import copy
import pickle

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, CompileConfig

import avl_fx
from avl_fx import Plan, avl_backend
from avl_fx.errors import CaptureError, OptionError, PlanMismatchError, UnsupportedPlanError
from avl_fx.record import recording
from avl_fx.region import find_regions
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_graphs
from tests.zoo import ZOO

NEW_TOKENS = 4
EAGER = {"compiler": "eager", "strict": True}


@pytest.fixture
def llava():
    torch._dynamo.reset()
    zoo = ZOO["llava"]
    model = zoo.make()
    return model, zoo.inputs(model, batch=2)


def generate(model, inputs, **kwargs):
    kwargs.setdefault("disable_compile", True)
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)


def test_torch_compile_of_a_model(llava):
    model, inputs = llava
    with torch.no_grad():
        expected = model(**inputs).logits
        with recording() as recorder:
            got = torch.compile(model, backend="avl", options=EAGER)(**inputs).logits
    assert torch.allclose(got, expected, atol=FLOAT32_TOLERANCE)
    assert decoder_graphs(recorder)


@pytest.mark.parametrize(
    "backend", [pytest.param("avl", marks=pytest.mark.matrix), avl_backend], ids=["name", "function"]
)
def test_model_compile_then_generate(llava, backend):
    model, inputs = llava
    expected = generate(model, inputs)
    model.compile(backend=backend, options=EAGER)
    with recording() as recorder:
        assert torch.equal(generate(model, inputs), expected)
    assert decoder_graphs(recorder)


@pytest.mark.parametrize("backend", ["avl", avl_backend], ids=["name", "function"])
def test_compile_config_of_transformers(llava, backend):
    """Transformers compiles decoding itself for static caches; its configuration deep-copies the backend."""
    model, inputs = llava
    expected = generate(model, inputs, cache_implementation="static")
    config = CompileConfig(backend=backend, mode=None, fullgraph=False, options=dict(EAGER))
    config._compile_all_devices = True  # transformers leaves CPUs alone otherwise
    with recording() as recorder:
        got = generate(
            model, inputs, cache_implementation="static", compile_config=copy.deepcopy(config), disable_compile=False
        )
    assert torch.equal(got, expected)
    assert decoder_graphs(recorder)


def test_transformers_decode_only_compile_with_a_lazy_plan(llava):
    """The prefill runs eagerly and is dense; decoding is lazy on the anchors' keys. Nothing is NaN."""
    model, inputs = llava
    config = CompileConfig(backend="avl", mode=None, options=EAGER | {"plan": Plan.lazy([(0, 1)])})
    config._compile_all_devices = True
    with recording() as recorder:
        out = generate(
            model,
            inputs,
            cache_implementation="static",
            compile_config=config,
            disable_compile=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert all(step.isfinite().all() for step in out.logits)
    assert any(s.action == "lazy (anchor 0)" for g in recorder.graphs for s in g.sites)


def by_itself(model, inputs, **more):
    """As `generate` runs on a GPU: over a static cache it compiles the decode steps of the whole model."""
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config, "disable_compile": False}
    return generate(model, inputs, **static, **more)


@pytest.mark.parametrize(
    "plan",
    [Plan.lazy([(1, 3)]), pytest.param(Plan.avl(0.3, 0.5, 3, text=None), marks=pytest.mark.matrix)],
    ids=str,
)
def test_generate_does_not_compile_past_avl_compile(llava, plan, caplog):
    model, inputs = llava
    avl_fx.compile(model, plan, options=EAGER)
    expected = generate(model, inputs, cache_implementation="static")
    with recording() as recorder:
        assert torch.equal(by_itself(model, inputs), expected)
    copied = copy.deepcopy(model)
    assert copied.get_compiled_call(None).__self__ is copied
    avl_fx.uncompile(model)
    assert "get_compiled_call" not in vars(model)
    assert not recorder.graphs  # nothing was left to compile
    assert "avl_fx" not in {record.name for record in caplog.records}


@pytest.mark.parametrize("part", ["call", pytest.param("forward", marks=pytest.mark.matrix)])
def test_nor_past_a_model_that_is_compiled_as_a_whole(llava, part):
    model, inputs = llava
    options = EAGER | {"plan": Plan.lazy([(1, 3)])}
    if part == "call":
        model.compile(backend="avl", options=options)
    else:
        model.forward = torch.compile(model.forward, backend="avl", options=options)
    expected = generate(model, inputs, cache_implementation="static")
    assert torch.equal(by_itself(model, inputs), expected)


def test_torch_compile_around_avl_compile_is_announced(llava, caplog):
    model, inputs = llava
    expected = model(**inputs).logits
    avl_fx.compile(model, Plan.lazy([(1, 3)]), options=EAGER)
    outer = torch.compile(model, backend="eager")
    outer(**inputs)
    got = outer(**inputs).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert caplog.text.count("was compiled by avl_fx.compile, and now torch.compile traces it as it is written") == 1


def in_place(model):
    model.compile(backend="eager")
    return model


def its_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def its_decoder(model):
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


@pytest.mark.parametrize("how", [in_place, its_forward, its_decoder, lambda m: torch.compile(m, backend="eager")])
def test_a_model_that_is_compiled_already_is_refused(llava, how):
    """What was compiled before would go past it, at every call."""
    model, _ = llava
    with pytest.raises(CaptureError, match=r"is compiled by torch\.compile already") as raised:
        avl_fx.compile(how(model), options=EAGER)
    assert raised.value.field == "model"
    assert not model._forward_pre_hooks


def test_a_model_of_one_region_may_be_compiled_again():
    """As with `nn.Module.compile`."""
    model = ZOO["plain_lvlm"].make()
    model.compile(backend="eager")
    assert avl_fx.compile(model, options=EAGER) is model
    avl_fx.compile(model, options=EAGER)


def test_avl_compile_is_in_place_and_can_be_undone(llava):
    model, inputs = llava
    expected = generate(model, inputs)
    names = [n for n, _ in model.named_parameters()]
    assert avl_fx.compile(model, options=EAGER) is model
    with recording() as recorder:
        assert torch.equal(generate(model, inputs), expected)
    assert decoder_graphs(recorder)
    assert [n for n, _ in model.named_parameters()] == names
    avl_fx.uncompile(model)
    with recording() as recorder:
        assert torch.equal(generate(model, inputs), expected)
    assert not recorder.graphs
    assert not model._forward_pre_hooks
    avl_fx.uncompile(model)  # nothing to undo: fine


def test_avl_compile_again_replaces_the_plan(llava):
    model, inputs = llava
    dense = generate(model, inputs)
    avl_fx.compile(model, Plan.lazy([(0, 3)]), options=EAGER)
    lazy = generate(model, inputs)
    avl_fx.compile(model, options=EAGER)
    assert torch.equal(generate(model, inputs), dense)
    assert not torch.equal(lazy, dense)


def test_backend_and_plan_survive_copies():
    assert copy.deepcopy(avl_backend) is avl_backend
    assert pickle.loads(pickle.dumps(avl_backend)) is avl_backend
    plan = Plan.lazy([(0, 1)])
    assert copy.deepcopy({"plan": plan})["plan"] == plan


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_of_torch_compile(llava, mode):
    model, _ = llava
    decoder = model.model.language_model.layers[0].mlp
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        assert torch.allclose(torch.compile(decoder, backend="avl", mode=mode)(x), decoder(x), atol=1e-5)


def test_training_step_through_the_identity_plan(llava):
    """Gradients pass through the rewritten graph."""
    model, inputs = llava
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def gradient(forward):
        model.zero_grad()
        forward(**inputs).logits.square().mean().backward()
        return model.model.language_model.layers[1].self_attn.k_proj.weight.grad.clone()

    expected = gradient(model)
    got = gradient(torch.compile(model, backend="avl", options={"compiler": "aot_eager", "strict": True}))
    assert torch.allclose(got, expected, atol=1e-5 * expected.abs().max().item() + 1e-7)


@pytest.mark.parametrize("front_door", ["torch.compile", "avl_fx.compile"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"plan": Plan.lazy([(2, 9)])}, PlanMismatchError, ["blocks", "9", "Fix:"]),
        ({"plan": Plan.lazy([(0, 1)], num_layers=12)}, PlanMismatchError, ["12", "4", "Fix:"]),
        ({"plan": {"prefill": {}}}, UnsupportedPlanError, ["vision", "Fix:"]),
        ({"plan": Plan.lazy([(2, 3)]).combine(Plan.avl(prefill=0.5))}, UnsupportedPlanError, ["prefill", "Fix:"]),
        ({"plann": "identity"}, OptionError, ["plann", "plan", "Fix:"]),
        ({"max_autotune": True}, OptionError, ["inductor", "Fix:"]),
        ({"compiler": "gcc"}, OptionError, ["compiler", "Fix:"]),
    ],
)
def test_mistakes_are_typed_errors(llava, front_door, options, error, words):
    """Raised as they are, not wrapped by Dynamo, and the model still works afterwards."""
    model, inputs = llava
    bare = front_door == "torch.compile"
    # What does not depend on the model is said of the first graph, whatever it holds.
    part, given = (model, inputs) if error is PlanMismatchError else (model.lm_head, {"input": torch.randn(1, 64)})
    before = part(**given)
    with pytest.raises(error) as caught:
        torch.compile(part, backend="avl", options=options)(**given) if bare else avl_fx.compile(model, options=options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert torch.equal(part(**given)[0], before[0])


def test_avl_compile_wants_a_module_and_no_other_backend(llava):
    model, _ = llava
    with pytest.raises(CaptureError, match="Fix:"):
        avl_fx.compile("llava")
    with pytest.raises(OptionError, match="backend"):
        avl_fx.compile(model, backend="inductor")
    with pytest.raises(OptionError, match="dynamics"):
        avl_fx.compile(model, dynamics=True)
    with pytest.raises(OptionError, match="plan"):
        avl_fx.compile(model, Plan.lazy([(0, 1)]), options={"plan": Plan.lazy([(0, 2)])})


def test_of_an_encoder_decoder_the_decoder_is_compiled():
    """The module that holds both halves is never called as a whole, and numbers of layers are the encoder's there."""
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(**sizes, **heads, encoder_layers=1, decoder_layers=3, max_position_embeddings=64)
    model = BartForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert find_regions(model)[0].module is model.model.decoder
    with pytest.raises(PlanMismatchError, match="3 decoder layers"):
        avl_fx.compile(model, Plan.lazy([(1, 3)]))
    with recording() as recorder:
        avl_fx.compile(model, Plan.lazy([(1, 2)]), options={"compiler": "eager"})
        got = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, expected)
    assert recorder.graphs
