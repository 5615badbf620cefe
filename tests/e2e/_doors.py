"""The two front doors, as a test uses them, and what went through the backend meanwhile."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import avl_fx
from avl_fx.passes.share_queries import DECODER_ROLES
from avl_fx.passes.site import Site
from avl_fx.record import GraphRecord, Recorder, recording
from benchmarks._difference import largest_difference
from tests.zoo import ZooModel

DOORS = ("avl_fx.compile", "torch.compile")
FLOAT32_TOLERANCE = 2e-4
"""Absolute, on logits of order 1 to 10: what another order of summation may change in float32."""


@contextlib.contextmanager
def through(door: str, model: nn.Module, dynamic: bool | None = None, **options: Any) -> Iterator[Recorder]:
    """Compile ``model`` by ``door`` for the block; afterwards it is as it was. ``dynamic`` as for ``torch.compile``."""
    torch._dynamo.reset()
    options.setdefault("strict", True)
    with recording() as recorder:
        if door == "avl_fx.compile":
            avl_fx.compile(model, options.pop("plan", None), options=options, dynamic=dynamic)
        else:
            model.forward = torch.compile(model.forward, backend="avl", options=options, dynamic=dynamic)
        try:
            yield recorder
        finally:
            avl_fx.uncompile(model)
            vars(model).pop("forward", None)
            torch._dynamo.reset()


def decoder_sites(graph: GraphRecord) -> list[Site]:
    """Sites of the language decoder in one graph."""
    return [s for s in graph.sites if s.role in DECODER_ROLES]


def decoder_graphs(recorder: Recorder) -> list[GraphRecord]:
    """Graphs that hold a part of the language decoder."""
    return [g for g in recorder.graphs if decoder_sites(g)]


def whole(zoo: ZooModel, recorder: Recorder) -> bool:
    """Whether every decoder graph holds all decoder layers, each exactly once."""
    layers = list(range(zoo.decoder_layers))
    return all(sorted(s.layer for s in decoder_sites(g)) == layers for g in decoder_graphs(recorder))


def largest(left: list[Tensor], right: list[Tensor]) -> float:
    """Largest absolute difference between two runs, over all steps and logits; NaN passes no comparison."""
    assert len(left) == len(right)
    return largest_difference(left, right)
