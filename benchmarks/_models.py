"""Random Llama-like LLaVA models for benchmarks: shapes matter, weights do not."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE = 5


def llava(
    layers: int, hidden: int, heads: int, kv_heads: int, visual_tokens: int, dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """A LLaVA with a two-layer vision encoder and a decoder of the given shape; MLP ratio 8/3 as in Llama."""
    side = round(visual_tokens**0.5)
    if side * side != visual_tokens:
        raise ValueError(f"visual_tokens must be a square, got {visual_tokens}")
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=14 * side,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=1024,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=2 * visual_tokens + 512,
        ),
        image_token_index=IMAGE,
        image_seq_length=visual_tokens,
    )
    model = LlavaForConditionalGeneration(config).to(dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(model: LlavaForConditionalGeneration, batch: int, text: int = 32) -> dict[str, Tensor]:
    """One image between two halves of ``text`` tokens, in every row."""
    visual = model.config.image_seq_length
    ids = torch.randint(10, 1000, (batch, text + visual), generator=torch.Generator().manual_seed(1))
    ids[:, text // 2 : text // 2 + visual] = IMAGE
    size = model.config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
