"""Low-rank adapters: trained as extra branches, merged away at load time so that nothing but the stock model runs."""

from __future__ import annotations

import math

import torch
from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """`base(x) + scale * (x A^T) B^T`, with `base` frozen; x is [..., in], A is [r, in], B is [out, r]."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(x, self.A)
        return self.base(x) + nn.functional.linear(low, self.B * self.scale)


def add_lora(model: nn.Module, rank: int, scale: float) -> dict[str, LoRALinear]:
    """Wrap every linear layer of a decoder in place; returns the adapters by the name of the layer they wrap."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in PROJECTIONS}
    adapters: dict[str, LoRALinear] = {}
    for name, layer in found.items():
        parent, _, leaf = name.rpartition(".")
        adapters[name] = LoRALinear(layer, rank, scale)
        setattr(model.get_submodule(parent), leaf, adapters[name])
    return adapters


def merge_lora(weights: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], scale: float, prefix: str) -> None:
    """Add every `lora.<layer>.{A,B}` pair of `adapter` to `weights[prefix + <layer> + ".weight"]`, in float32.

    The sum is rounded once to the weight's own dtype.
    """
    layers = sorted(key.removesuffix(".A") for key in adapter if key.startswith("lora.") and key.endswith(".A"))
    for layer in layers:
        key = f"{prefix}{layer.removeprefix('lora.')}.weight"
        delta = adapter[f"{layer}.B"].float() @ adapter[f"{layer}.A"].float()
        weights[key] = (weights[key].float() + scale * delta).to(weights[key].dtype)
