"""Contenders that go wrong, each in its way. Importing this module lets them take part (`--extra`)."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from benchmarks.gpu.contenders import Contender, Forward, add
from benchmarks.gpu.settings import Settings


def _raises(model: Any, settings: Settings) -> Forward:
    raise torch.OutOfMemoryError("tried to allocate more than there is")


def _ends(model: Any, settings: Settings) -> Forward:
    os._exit(7)


def _hangs(model: Any, settings: Settings) -> Forward:
    time.sleep(1000)
    return model.forward


def _lies(model: Any, settings: Settings) -> Forward:
    def forward(**inputs: Any) -> Any:
        out = model.forward(**inputs)
        out.logits = out.logits + 0.01
        return out

    return forward


for _name, _make in (("raises", _raises), ("ends", _ends), ("hangs", _hangs), ("lies", _lies)):
    add(Contender(f"broken: {_name}", "static", _make, ours=True, phases=("decode",)))
