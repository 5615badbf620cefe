"""The model with other weights than its own: those of an adapter that was trained under lazy plans."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from avl_fx import Contender
from examples.petite_vlm.model import load_petite_vlm
from examples.petite_vlm.parts import sha256_of

__all__ = ["with_weights_of"]


def with_weights_of(adapter: Path, contender: Contender) -> Contender:
    """``contender`` on the model with the weights that ``adapter`` makes."""
    prepare = functools.partial(_exchanged, adapter=adapter, contender=contender)
    return replace(contender, identity=f"{sha256_of(adapter)[:16]} {contender.identity}", prepare=prepare)


@contextlib.contextmanager
def _exchanged(model: nn.Module, *, adapter: Path, contender: Contender) -> Iterator[None]:
    other, _ = load_petite_vlm(adapter)
    theirs = dict(other.named_parameters())
    own = {name: p.detach().clone() for name, p in model.named_parameters() if not torch.equal(p, theirs[name])}
    with torch.no_grad():
        for name in own:
            model.get_parameter(name).copy_(theirs[name])
    del other, theirs
    try:
        with contender.prepare(model):
            yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                model.get_parameter(name).copy_(value)
