"""CUDA graphs return the same tensors at every call: what rode on one in an earlier call is no news of the next."""

import pytest
import torch
from torch import nn

from avl_fx import Plan, _compat
from avl_fx.modality import carried
from avl_fx.options import BackendOptions
from tests.e2e._doors import FLOAT32_TOLERANCE, largest, through
from tests.e2e.test_avl import blocks_of
from tests.zoo import ZOO
from tests.zoo._base import FIRST_TEXT, IMAGE, LAST_TEXT
from tests.zoo._run import prefill_and_decode

PLANS = {
    "avl": lambda zoo: Plan.avl(core=0.2, secondary=0.4, refresh=2, text=None),
    "vla_scores": lambda zoo: Plan.lazy(blocks_of(zoo), "vla_scores"),
}


@pytest.fixture
def as_cuda_graphs_do(monkeypatch):
    """Graphs write what they return into the tensors that they returned at the first call of these sizes."""
    compile_graph, reused = _compat.compile_graph, []

    def compiled(gm, inputs, compiler, config):
        call, kept = compile_graph(gm, inputs, compiler, {}), {}

        def replay(*inputs):
            outputs = list(call(*inputs))
            sizes = tuple(x.shape if isinstance(x, torch.Tensor) else None for x in outputs)
            if sizes not in kept:
                mine = {id(x) for x in inputs}
                kept[sizes] = [None if id(x) in mine else x for x in outputs]
                return outputs
            for position, (old, new) in enumerate(zip(kept[sizes], outputs, strict=True)):
                if isinstance(old, torch.Tensor) and not old.requires_grad:
                    old.data.copy_(new.clone())  # no write that PyTorch counts
                    outputs[position] = old
                    reused.append(old)
            return outputs

        return replay

    monkeypatch.setattr(_compat, "compile_graph", compiled)
    monkeypatch.setattr(BackendOptions, "inductor_config", lambda self: {"triton.cudagraphs": True})
    return reused


@pytest.mark.parametrize("plan", PLANS)
def test_a_prompt_without_images_after_one_with_them(plan, as_cuda_graphs_do):
    zoo = ZOO["llava"]
    model = zoo.make()
    images = zoo.inputs(model, batch=1)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(FIRST_TEXT, LAST_TEXT, images["input_ids"].shape, generator=generator)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = prefill_and_decode(model, text, "dynamic", steps=5)
    with through("avl_fx.compile", model, compiler="eager", plan=PLANS[plan](zoo)):
        for _ in range(2):  # sizes that change are left open at the second
            prefill_and_decode(model, images, "dynamic", steps=0)
        got = prefill_and_decode(model, text, "dynamic", steps=5, tokens=expected.tokens)
    assert as_cuda_graphs_do, "tensors were used again"
    assert largest(got, expected) <= FLOAT32_TOLERANCE


class Layers(nn.Module):
    """Two graphs: hidden states leave one and enter the next, as where Dynamo breaks a decoder into its layers."""

    def forward(self, x, ids):
        x = x + 1
        if ids is not None:
            x = x.masked_scatter((ids == IMAGE)[..., None], x)
        torch._dynamo.graph_break()
        x = x * 2
        torch._dynamo.graph_break()
        return x - 1


def test_positions_of_an_earlier_prompt_do_not_ride_on(as_cuda_graphs_do):
    torch._dynamo.reset()
    model, ids = Layers(), torch.tensor([[1, IMAGE, IMAGE, 2]])
    model.compile(backend="avl", options={"compiler": "eager"})
    x, seen = torch.ones(1, 4, 8), []
    for shown in (ids, ids.roll(1), None, ids):
        with torch.no_grad():
            seen.append(carried([model(x, shown)]))
    assert len(as_cuda_graphs_do) > 4
    assert torch.equal(seen[0], ids == IMAGE)
    assert torch.equal(seen[1], ids.roll(1) == IMAGE)
    assert seen[2] is None
    assert torch.equal(seen[3], ids == IMAGE)
