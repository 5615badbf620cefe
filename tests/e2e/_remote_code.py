"""Models as they come with code of their own (``trust_remote_code``): three ways to bring images into a prompt.

Each embeds the prompt's tokens itself, puts image features among them, and hands embeddings to a language model, or to
its ``generate``: the forward of the whole model is not called. Sizes are tiny, weights random.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.zoo._base import finish, randomise, seeded

HIDDEN, LAYERS, VOCAB, IMAGE = 64, 4, 128, 120
TOWER, SIDE, PATCH = 32, 24, 6
TOKENS = (SIDE // PATCH) ** 2
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Encoder(nn.Module):
    """Image features ``[images, TOKENS, HIDDEN]``."""

    def __init__(self) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=TOWER,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        )
        self.tower, self.projector = CLIPVisionModel(config), nn.Linear(TOWER, HIDDEN)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projector(self.tower(pixel_values).last_hidden_state[:, 1:])


# ---- InternVL: over the embeddings of a token that its code knows and its configuration does not ---------------------


class InternConfig(PretrainedConfig):
    model_type = "tests_internvl_chat"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.llm_config = LlamaConfig(**LLAMA)


class InternChat(PreTrainedModel):
    config_class = InternConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.vision = Encoder()
        self.language_model = LlamaForCausalLM(config.llm_config)
        self.img_context_token_id = IMAGE

    def embed(self, pixel_values, input_ids):
        embeds = self.language_model.get_input_embeddings()(input_ids)
        batch, length, hidden = embeds.shape
        flat = embeds.reshape(batch * length, hidden)
        flat[input_ids.flatten() == self.img_context_token_id] = self.vision(pixel_values).reshape(-1, hidden)
        return flat.reshape(batch, length, hidden)

    def forward(self, pixel_values, input_ids, attention_mask=None, **kwargs):
        embeds = self.embed(pixel_values, input_ids)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(self, pixel_values, input_ids, attention_mask=None, **kwargs):
        embeds = self.embed(pixel_values, input_ids)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


# ---- the original LLaVA: between the embeddings of pieces of text, padded with zeros ---------------------------------


class LlavaLlamaConfig(LlamaConfig):
    model_type = "tests_llava_llama"


class LlavaLlamaModel(LlamaModel):
    config_class = LlavaLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision = Encoder()


class LlavaLlama(LlamaForCausalLM):
    config_class = LlavaLlamaConfig
    PLACE = -200

    def __init__(self, config):
        super().__init__(config)
        self.model = LlavaLlamaModel(config)

    def embed(self, images, input_ids, attention_mask):
        rows = []
        for features, ids, real in zip(self.model.vision(images), input_ids, attention_mask.bool(), strict=True):
            before, after = self._around(ids[real])
            text = self.model.embed_tokens(torch.cat([before, after]))
            rows.append(torch.cat([text[: len(before)], features, text[len(before) :]]))
        longest = max(map(len, rows))
        embeds = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        return embeds, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def _around(self, ids):
        at = int((ids == self.PLACE).nonzero())
        return ids[:at], ids[at + 1 :]

    def forward(self, input_ids=None, attention_mask=None, images=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None and images is not None:
            inputs_embeds, attention_mask = self.embed(images, input_ids, attention_mask)
            input_ids = None
        return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)

    @torch.no_grad()
    def generate(self, inputs, images, attention_mask, **kwargs):
        embeds, mask = self.embed(images, inputs, attention_mask)
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)


# ---- MiniCPM-V: over bounds that its processor names; nobody calls the language model "language_model" ---------------


class MiniCPMConfig(LlamaConfig):
    model_type = "tests_minicpm_v"


class MiniCPMV(PreTrainedModel):
    config_class = MiniCPMConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.llm, self.vpm = LlamaForCausalLM(config), Encoder()

    def embed(self, data):
        embeds = self.llm.model.embed_tokens(data["input_ids"])
        for row, (start, end), features in zip(
            embeds, data["image_bound"], self.vpm(data["pixel_values"]), strict=True
        ):
            row.scatter_(0, torch.arange(start, end)[:, None].expand(-1, HIDDEN), features)
        return embeds

    def forward(self, data, **kwargs):
        mask = data["attention_mask"]
        return self.llm(input_ids=None, inputs_embeds=self.embed(data), attention_mask=mask, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids=None, pixel_values=None, image_bound=None, attention_mask=None, **kwargs):
        data = {"input_ids": input_ids, "pixel_values": pixel_values, "image_bound": image_bound}
        return self.llm.generate(inputs_embeds=self.embed(data), attention_mask=attention_mask, **kwargs)


# ---- as tests use them -----------------------------------------------------------------------------------------------

BEFORE, LENGTH, PADDING = 5, 40, 3
"""Tokens before the image, tokens of a prompt, and padding in front of its second row."""


@dataclass(frozen=True)
class Remote:
    """One of them."""

    kind: type[PreTrainedModel]
    config: Callable[[], PretrainedConfig]
    inputs: Callable[[Tensor, Tensor, Tensor], dict[str, Any]]
    """What its `generate` takes, of token ids ``[batch, LENGTH]`` with `IMAGE` at images, a mask, and images."""
    layers: str
    """Path of the decoder's layers."""
    language_model: str
    """Path of what generates; empty for the model itself."""

    def make(self) -> PreTrainedModel:
        """With random weights, the same each time."""
        model = seeded(lambda: self.kind(self.config()), 0)
        randomise(model, 0)
        return finish(model, torch.float32)

    def prompts(self, batch: int = 2) -> tuple[dict[str, Any], Tensor]:
        """What `generate` takes, one image in each row, and the visual positions bool ``[batch, LENGTH]``."""
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(1, IMAGE, (batch, LENGTH), generator=generator)
        ids[:, BEFORE : BEFORE + TOKENS] = IMAGE
        mask = torch.ones_like(ids)
        mask[1:, :PADDING] = 0
        pixel_values = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
        return self.inputs(ids, mask, pixel_values), ids == IMAGE


def _pieces(ids: Tensor, mask: Tensor, images: Tensor) -> dict[str, Any]:
    place = torch.full_like(ids[:, :1], LlavaLlama.PLACE)
    outside = [slice(None, BEFORE), slice(BEFORE + TOKENS, None)]
    before, after = (ids[:, part] for part in outside)
    seen = torch.cat([mask[:, outside[0]], torch.ones_like(place), mask[:, outside[1]]], 1)
    return {"inputs": torch.cat([before, place, after], 1), "attention_mask": seen, "images": images}


REMOTE = {
    "internvl_chat": Remote(
        InternChat,
        InternConfig,
        lambda ids, mask, images: {"input_ids": ids, "attention_mask": mask, "pixel_values": images},
        "language_model.model.layers",
        "language_model",
    ),
    "llava_llama": Remote(LlavaLlama, lambda: LlavaLlamaConfig(**LLAMA), _pieces, "model.layers", ""),
    "minicpm_v": Remote(
        MiniCPMV,
        lambda: MiniCPMConfig(**LLAMA),
        lambda ids, mask, images: {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": images,
            "image_bound": [(BEFORE, BEFORE + TOKENS)] * len(ids),
        },
        "llm.model.layers",
        "llm",
    ),
}
