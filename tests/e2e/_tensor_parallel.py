"""Run by `test_tensor_parallel` in each of two processes: a model whose heads are spread over them, under plans."""

import sys
from pathlib import Path

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlavaForConditionalGeneration

from avl_fx import AVLCache, Plan
from avl_fx.calibrate import calibrated
from tests.e2e._doors import FLOAT32_TOLERANCE, decoder_sites, largest, through
from tests.zoo import ZOO
from tests.zoo._run import prefill_and_decode

STEPS = 6
TARGETS = {"lazy_share": 0.5}
PLANS = {
    "identity": Plan.identity(),
    "gla": Plan.lazy([(0, 3)]),
    "vla_scores": Plan.lazy([(0, 3)], "vla_scores"),
    "shared": Plan.avl(0.3, 0.5, 2, text=0.5),
    "per_kv_head": Plan.avl(0.3, 0.5, 2, text=0.5, scores="per_kv_head"),
    "filter": Plan.avl(0.3, 0.5, 2, text=None, prefill=0.6, prefill_after_layer=1),
    "filter, per_kv_head": Plan.avl(0.3, 0.5, 2, text=None, scores="per_kv_head", prefill=0.6, prefill_after_layer=1),
}
SPREAD = {
    "self_attn.[qkv]_proj": ColwiseParallel,
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def by_transformers(folder: Path) -> nn.Module:
    """The model in ``folder``, this process's heads of it, by transformers' own plan."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto")
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, distributed_config=config).eval()


def by_torch(folder: Path) -> nn.Module:
    """The same by `parallelize_module`."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.language_model.layers:
        parallelize_module(layer, mesh, {name: how() for name, how in SPREAD.items()})
    return model


def main(folder: Path, how: str, names: list[str]) -> None:
    """Raises where an answer is another than that of one process."""
    torch.distributed.init_process_group("gloo")
    alone, model = ZOO["llava"].make(), {"transformers": by_transformers, "torch": by_torch}[how](folder)
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    assert isinstance(weight, DTensor), "nothing is spread"
    inputs = ZOO["llava"].inputs(alone, 2)
    tokens = prefill_and_decode(alone, inputs, steps=STEPS).tokens
    if "calibrate" in names:
        names.remove("calibrate")
        found = [calibrated(module, [inputs], TARGETS, progress=False) for module in (alone, model)]
        torch.testing.assert_close(*(torch.tensor(report.matrix) for report in found), atol=1e-5, rtol=1e-3)
        assert found[0].plan == found[1].plan
    for name in names:
        plan = PLANS[name]
        runs = []
        for module in (alone, model):
            cache = AVLCache(plan, module.config) if plan.reads_less else "dynamic"
            with through("avl_fx.compile", module, compiler="eager", plan=plan) as recorder:
                runs.append(prefill_and_decode(module, inputs, cache, STEPS, tokens=tokens))
            sites = [site for graph in recorder.graphs for site in decoder_sites(graph)]
            assert sites
            assert not [site.reason for site in sites if site.reason is not None], name
            assert plan.filters_prompts == any("of the visual tokens" in site.action for site in sites), name
        assert largest(*runs) <= FLOAT32_TOLERANCE, (name, largest(*runs))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
