"""The training loop: LoRA on the decoder and the projector, everything else frozen; resumable to the bit."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from avl_fx import Plan

from .lora import LoRALinear, add_lora
from .model import FEATURE_LAYERS
from .packing import Encoded, loss_and_hits, pack, packed_logits
from .sources import Source
from .under_plans import allow_graphs, under_plans

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """All that decides the result, besides the data and the parts."""

    steps: int = 220
    images_per_step: int = 6
    questions_per_image: int = 4  # at most; images with one question only are left out
    rank: int = 16
    lora_scale: float = 2.0
    lora_lr: float = 1e-3
    projector_lr: float = 1e-3
    warmup: int = 20
    decay_steps: int = 400  # half period of the cosine
    cooldown: int = 70  # last steps, over which the rate also falls linearly to zero
    clip: float = 1.0
    seed: int = 0
    data: str = "easy_vqa:1"  # data sets and their shares of the images
    image_size: int = 168  # pixels
    start: str = ""  # sha256 of the adapter that this one goes on from
    feature_layers: tuple[int, ...] = FEATURE_LAYERS  # of the vision encoder
    precision: Precision = "float32"  # of products; bfloat16 is for GPUs, and CPUs that multiply it (avx512_bf16, AMX)
    plans: tuple[str, ...] = ()  # as JSON: the steps are done under each in turn

    def rate(self, step: int) -> float:
        """Factor on the learning rates at a step: linear warm-up, a slow cosine, a linear end."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.decay_steps - self.warmup)))
        return cosine * min(1.0, (self.steps - step) / max(1, self.cooldown))


def init_projector(projector: nn.Module, features: torch.Tensor, target_std: float) -> None:
    """Start where the decoder can read: inputs standardised by channel, outputs as large as word embeddings.

    `features` [N, tokens, width] is a sample of what will come in. The standardisation is folded into `linear_1`.
    """
    sample = features.float().cpu().flatten(0, 1)
    mean, std = sample.mean(0), sample.std(0) + 1e-6
    first, second = projector.linear_1, projector.linear_2
    with torch.no_grad():
        first.weight.normal_(std=1 / math.sqrt(first.in_features)).div_(std.to(first.weight.device))
        first.bias.copy_(-(first.weight @ mean.to(first.weight.device)))
        # 0.425 is the second moment of GELU of a standard normal variable.
        second.weight.normal_(std=target_std / math.sqrt(0.425 * second.in_features))
        second.bias.zero_()


def _start_worker() -> None:
    torch.set_num_threads(1)
    allow_graphs()


class Trainer:
    """Trains `model` in place on the rows of a `Source`."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        recipe: Recipe,
        source: Source,
        workers: int = 1,
        start: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """``start``: the tensors of an adapter file to go on from, or of a projector alone; ranks must agree.

        Raises:
            ValueError: the file's tensors are not those that this recipe trains.
        """
        # On a CPU that others use too, workers of one thread each beat one worker of several threads by far: OpenMP
        # waits for its slowest thread after every matrix product, workers wait once a step.
        self.workers = min(workers, recipe.images_per_step)
        self.pool: ThreadPoolExecutor | None = None
        if self.workers > 1:
            self.pool = ThreadPoolExecutor(self.workers, initializer=_start_worker)
        self.model, self.recipe, self.source = model, recipe, source
        self.image_token_id = model.config.image_token_id
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        torch.manual_seed(recipe.seed)
        model.requires_grad_(False)
        self.projector = model.model.multi_modal_projector.requires_grad_(True)
        if start is None:
            init_projector(self.projector, source.sample(), float(model.get_input_embeddings().weight.std()))
        self.adapters: dict[str, LoRALinear] = add_lora(model.model.language_model, recipe.rank, recipe.lora_scale)
        if start is not None:
            self._go_on_from(start)
        self.students = under_plans(model, [Plan.from_json(text) for text in recipe.plans])
        """The model under each plan of the recipe; as it is where there is none."""
        lora = [p for adapter in self.adapters.values() for p in (adapter.A, adapter.B)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": lora, "lr": recipe.lora_lr, "base": recipe.lora_lr},
                {"params": list(self.projector.parameters()), "lr": recipe.projector_lr, "base": recipe.projector_lr},
            ],
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def gradients(self, rows: Sequence[Sequence[Encoded]]) -> tuple[float, torch.Tensor, int, tuple[torch.Tensor, ...]]:
        """Of some rows: summed loss, hits [Q] bool, number of answer tokens, gradients of the summed loss."""
        batch = pack(rows, self.source.prefix, self.model.device)
        features = self.source.features_of(rows).to(self.model.device)
        half = self.recipe.precision == "bfloat16"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=half):
            student = self.students[self.step % len(self.students)]
            logits = packed_logits(student, batch, features, self.image_token_id)
        loss, hits = loss_and_hits(logits, batch)
        total = loss * len(batch.targets)
        return total.item(), hits, len(batch.targets), self._gradients(total)

    def _gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Under a lazy plan nothing depends on the queries and keys of lazy layers.
        return torch.autograd.grad(loss, self.parameters(), materialize_grads=True)

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns what was measured."""
        began = time.perf_counter()
        # Longest first, so that every worker gets rows of like length and pads little.
        rows = sorted(self.source.rows_of(self.step), key=lambda row: -sum(len(item.suffix) for item in row))
        if self.pool is None:
            shares = [self.gradients(rows)]
        else:
            shares = list(self.pool.map(self.gradients, [rows[i :: self.workers] for i in range(self.workers)]))
        tokens = sum(share[2] for share in shares)
        hits = torch.cat([share[1] for share in shares])
        for parameter, *grads in zip(self.parameters(), *(share[3] for share in shares), strict=True):
            parameter.grad = sum(grads[1:], grads[0]) / tokens
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * self.recipe.rate(self.step)
        self.optimizer.step()
        self.step += 1
        point = {
            "step": self.step,
            "loss": sum(share[0] for share in shares) / tokens,
            "accuracy": hits.float().mean().item(),
            "questions": len(hits),
            "gradient_norm": norm.item(),
            "seconds": time.perf_counter() - began,
        }
        self.curve.append(point)
        return point

    def _named(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names of the adapter file."""
        found = {f"lora.{name}.{leaf}": getattr(a, leaf) for name, a in self.adapters.items() for leaf in ("A", "B")}
        return found | {f"projector.{name}": p for name, p in self.projector.named_parameters()}

    def _go_on_from(self, start: Mapping[str, torch.Tensor]) -> None:
        named = self._named()
        if all(name.startswith("projector.") for name in start):  # aligned (`align`): the decoder is as it came
            named = {name: p for name, p in named.items() if name.startswith("projector.")}
        wrong = [n for n in named.keys() | start.keys() if n not in named or n not in start]
        wrong += [n for n in named.keys() & start.keys() if named[n].shape != start[n].shape]
        if wrong:
            raise ValueError(
                f"the adapter to go on from differs in {len(wrong)} tensors, for example {min(wrong)}: it is of "
                "another model or another rank. Choose the rank that it was trained with."
            )
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(start[name])

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """The trained tensors by the names of the adapter file, float32 on the CPU."""
        return {name: p.detach().float().cpu().contiguous() for name, p in self._named().items()}

    def export(self, path: Path) -> None:
        """Write the adapter, rounded to float16, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.partial")
        tensors = {name: value.half() for name, value in self.adapter_tensors().items()}
        recipe = json.dumps(asdict(self.recipe) | {"steps_done": self.step})
        metadata = {"format": "pt", "lora_scale": str(self.recipe.lora_scale), "recipe": recipe}
        save_file(tensors, scratch, metadata=metadata)
        path.with_suffix(".json").unlink(missing_ok=True)  # it describes the file that goes
        scratch.replace(path)

    def save(self, path: Path) -> None:
        """Write a checkpoint that `resume` continues from exactly; a crash leaves the previous one whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "trained": [p.detach() for p in self.parameters()],
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "curve": self.curve,
            "evaluations": self.evaluations,
        }
        scratch = path.with_name(f".{path.name}.partial")
        with scratch.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe."""
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(
                f"{path} was written by another recipe ({state['recipe']}). Choose another folder, or the same options."
            )
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), state["trained"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        self.step, self.curve, self.evaluations = state["step"], state["curve"], state["evaluations"]


@torch.inference_mode()
def teacher_forced_accuracy(
    model: LlavaForConditionalGeneration,
    rows: Sequence[Sequence[Encoded]],
    features_of: Callable[[Sequence[Sequence[Encoded]]], torch.Tensor],
    prefix: Sequence[int],
    rows_at_once: int = 8,
) -> tuple[float, float]:
    """Share of questions that greedy decoding would answer, and of answer tokens that it would choose.

    `features_of` gives what is seen with some rows: of their own pictures, or of others (the shuffled control).
    """
    hits: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    for start in range(0, len(rows), rows_at_once):
        some = rows[start : start + rows_at_once]
        batch = pack(some, prefix, model.device)
        vision = features_of(some).to(model.device)
        logits = packed_logits(model, batch, vision, model.config.image_token_id)
        hits.append(loss_and_hits(logits, batch)[1].cpu())
        right.append((logits.argmax(-1) == batch.targets).cpu())
    return torch.cat(hits).float().mean().item(), torch.cat(right).float().mean().item()
