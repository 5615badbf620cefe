"""A rewritten graph differentiates: gradients under a lazy plan equal autograd through the eager oracle.

This is what lazy instruction tuning needs (arXiv 2602.01901): train with the plan that will serve.
"""

import pytest
import torch
import torch.nn.functional as F

from avl_fx import Plan
from avl_fx.passes.site import Status
from tests.e2e._covering import one_each, rest_in_matrix
from tests.e2e._doors import decoder_graphs, decoder_sites, through
from tests.oracle import lazy_oracle
from tests.zoo import ZOO

TOLERANCE = 2e-3
"""Of a gradient, relative to the largest element of its tensor: float32, sums over a whole prompt."""

CASES = [
    (name, door, style, mode)
    for number, (name, mode) in enumerate(
        (name, mode) for name in ("llava", "qwen2_5_vl", "plain_lvlm") for mode in ("gla", "vla", "vla_scores")
    )
    for door, style in [(("torch.compile", "avl_fx.compile")[number % 2], ("sdpa", "eager")[number // 2 % 2])]
]


def trainable(zoo, style):
    """A model of the zoo whose decoder is trained; and inputs, with the next tokens as labels."""
    model = zoo.make(style).train()
    inputs = zoo.inputs(model, batch=2)
    for parameter in zoo.layers(model).parameters():
        parameter.requires_grad_(True)
    return model, {**inputs, "use_cache": False}


def gradients(zoo, model, inputs):
    """Of the loss on the text of the prompt, by name; zeros where nothing depends on a parameter."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    logits = out[0] if isinstance(out, tuple) else out.logits
    real = inputs["attention_mask"].bool()
    # Neither images nor what a padding position predicts, which is nobody's business.
    learnt = (real & ~zoo.visual_positions(model, inputs))[:, 1:] & real[:, :-1]
    labels = inputs["input_ids"][:, 1:].masked_fill(~learnt, -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten())
    loss.backward()
    named = dict(zoo.layers(model).named_parameters())
    return loss.item(), {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}


def check(name, door, style, mode, compiler, checkpointed=False):
    zoo = ZOO[name]
    model, inputs = trainable(zoo, style)
    blocks = [(1, zoo.decoder_layers - 1)]
    visual = zoo.visual_positions(model, inputs)
    dense_loss, dense = gradients(zoo, model, inputs)
    with lazy_oracle(model, blocks, zoo.decoder_prefix, zoo.attention_kinds, mode, visual):
        expected_loss, expected = gradients(zoo, model, inputs)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with through(door, model, compiler=compiler, plan=Plan.lazy(blocks, mode)) as recorder:
        loss, got = gradients(zoo, model, inputs)

    lazy = {s.layer for g in decoder_graphs(recorder) for s in decoder_sites(g) if s.anchor is not None}
    assert lazy == set(range(2, zoo.decoder_layers))
    assert all(s.status is Status.REWRITTEN for g in decoder_graphs(recorder) for s in decoder_sites(g))
    assert loss == pytest.approx(expected_loss, abs=1e-4)
    assert loss != pytest.approx(dense_loss, abs=1e-3)
    assert got.keys() == expected.keys()
    for parameter, gradient in expected.items():
        largest = max(gradient.abs().max().item(), 1e-6)
        assert (got[parameter] - gradient).abs().max().item() <= TOLERANCE * largest, parameter
    moved = [n for n in expected if (expected[n] - dense[n]).abs().max() > 0.01 * dense[n].abs().max()]
    assert moved
    return got


@pytest.mark.parametrize(
    "case",
    rest_in_matrix([case for case in CASES if case[0] != "plain_lvlm"], [("llava", "torch.compile", "sdpa", "gla")]),
    ids="-".join,
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradients_of_a_checkpointed_model_equal_the_oracles(case):
    """What most models of any size are trained with: each layer is a graph of its own behind one node."""
    check(*case, compiler="aot_eager", checkpointed=True)


@pytest.mark.parametrize("case", rest_in_matrix(CASES, one_each(CASES, by=(3,))), ids="-".join)
def test_gradients_equal_the_oracles(case):
    check(*case, compiler="aot_eager")


@pytest.mark.parametrize("mode", rest_in_matrix(["gla", "vla_scores"], ["gla"]))
def test_gradients_equal_the_oracles_through_inductor(mode):
    check("llava", "avl_fx.compile", "sdpa", mode, compiler="inductor")


def test_who_learns_from_a_lazy_layer():
    """Its own queries and keys do not, in mode `gla`; its anchor's learn from all that inherit them."""
    got = check("llava", "avl_fx.compile", "sdpa", "gla", compiler="eager")
    for layer in (2, 3):
        assert not got[f"{layer}.self_attn.q_proj.weight"].any()
        assert not got[f"{layer}.self_attn.k_proj.weight"].any()
        assert got[f"{layer}.self_attn.v_proj.weight"].any()
    assert got["1.self_attn.q_proj.weight"].any()
