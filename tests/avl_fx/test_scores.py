"""Scores of a model whose heads are in several processes: shared ones are of all heads, and the same everywhere."""

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from avl_fx.scores import Scores

HEADS = {0: (2, 4, 5), 3: (2, 4, 7)}
"""Layer -> batch, heads of all processes, keys: a filtered prompt has fewer keys in later layers."""


def all_heads() -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {layer: torch.rand(shape, generator=generator) for layer, shape in HEADS.items()}


def in_one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = {layer: rows.chunk(2, dim=1)[rank] for layer, rows in all_heads().items()}
    scores = Scores(own, torch.distributed.group.WORLD.group_name)
    assert scores.by("per_kv_head") is own
    torch.save(dict(scores.by("shared")), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="a build of torch without torch.distributed")
def test_two_processes_share_the_mean_of_all_heads(tmp_path):
    torch.multiprocessing.spawn(in_one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for layer, rows in all_heads().items():
        torch.testing.assert_close(first[layer], rows.mean(1, keepdim=True))
        assert torch.equal(first[layer], second[layer])


def test_one_process_has_all_heads():
    own = all_heads()
    for kind in ("shared", "per_kv_head"):
        assert Scores(own).by(kind) is own


def test_a_call_that_scores_nothing_asks_nobody():
    assert Scores({}, "a group that is not there").shared == {}
