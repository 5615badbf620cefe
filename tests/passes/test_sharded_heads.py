"""Tensor parallelism is seen in the graph: in a sum over processes behind one projection of what heads say."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from avl_fx.passes.find_attention import find_attention
from avl_fx.passes.sharded_heads import process_group
from avl_fx.passes.site import Site
from tests.passes._graphs import rewrite

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
