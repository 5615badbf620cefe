"""Tensor parallelism is seen in the graph: in a sum over processes behind one projection of what heads say."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.sharded_heads import process_group
from avl_fx.passes.site import Reason, Site
from avl_fx.plan import Plan
from tests.passes._decoder import WIDTH, Decoder, caches, hidden_states, specs
from tests.passes._graphs import check, rewrite

distributed = torch.distributed


@pytest.fixture(scope="module", autouse=True)
def group():
    """The name of a group with this process alone, in which every sum is what it was."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD.group_name
    distributed.destroy_process_group()


def attended(query, key, value):
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def summed(tensor):
    distributed.all_reduce(tensor)
    return tensor


def functional(tensor):
    name = distributed.group.WORLD.group_name
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(tensor, "sum", name))


def scattered(tensor):
    name = distributed.group.WORLD.group_name
    return torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.reduce_scatter_tensor(tensor, "sum", 1, name)
    )


def of_dtensor(tensor, weight, mesh):
    spread = DTensor.from_local(tensor, mesh, [Shard(-1)], run_check=False)
    return F.linear(spread, weight).redistribute(placements=[Replicate()]).to_local()


HEADS = tuple(torch.randn(2, 4, 3, 8) for _ in range(3))
WEIGHT = torch.randn(32, 32)

BEHIND = {
    "nothing": (lambda x: F.linear(x, WEIGHT), False),
    "in place": (lambda x: summed(F.linear(x, WEIGHT)), True),
    "functional": (lambda x: functional(F.linear(x, WEIGHT)), True),
    "matmul, gate, cast": (lambda x: functional((x.sigmoid() * x) @ WEIGHT.t().double().float()), True),
    "scattered": (lambda x: scattered(F.linear(x, WEIGHT)), True),
    "grouped experts alone": (lambda x: functional(F.gelu(F.linear(x, WEIGHT) + WEIGHT[0])), False),
    "experts alone": (lambda x: functional(F.linear(F.layer_norm(F.linear(x, WEIGHT), (32,)), WEIGHT)), False),
    "without a projection": (functional, True),
}


def site_of(function) -> Site:
    with torch.no_grad():
        return rewrite(function, *HEADS, stages=(find_attention,)).site


@pytest.mark.parametrize("name", BEHIND)
def test_the_group_of_the_sum_behind_the_projection(name, group):
    behind, spread = BEHIND[name]
    found = process_group(site_of(lambda q, k, v: behind(attended(q, k, v))))
    assert found == (group if spread else None)


def test_latents_become_values_first(group):
    site = site_of(lambda q, k, v: functional(F.linear(F.linear(attended(q, k, v), WEIGHT), WEIGHT)))
    assert process_group(site) is None
    site.latent = True
    assert process_group(site) == group


def test_a_distributed_tensor_that_is_to_be_summed():
    mesh = init_device_mesh("cpu", (1,))
    weight = DTensor.from_local(WEIGHT, mesh, [Shard(1)], run_check=False)
    site = site_of(lambda q, k, v: of_dtensor(attended(q, k, v), weight, mesh))
    assert process_group(site) == mesh.get_group().group_name


class Summed(nn.Linear):
    """A projection whose result is summed over the processes."""

    def forward(self, tensor):
        return functional(super().forward(tensor))


@torch.no_grad()
def test_a_layer_whose_heads_other_processes_share_stays_dense():
    """Scores of several layers are summed at once, over one group."""
    layers = specs(3)
    model = Decoder(layers).eval()
    attention = model.layers[1].attention
    projection, attention.o_proj = attention.o_proj, Summed(WIDTH, WIDTH, bias=False)
    attention.o_proj.load_state_dict(projection.state_dict())

    def edit(ctx):
        ctx.carried_visual = "given"

    causal = torch.ones(8, 8, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    rewritten = check(
        model, hidden_states(8), [causal], caches("first", layers), plan=Plan.avl(0.3, 0.5, text=None), edit=edit
    )
    assert rewritten.reasons == [None, Reason.OTHER_PROCESSES, None]
    assert [site.action for site in rewritten.sites] == ["dense, then partitioned", "dense", "dense, then partitioned"]
