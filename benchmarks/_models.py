"""Random vision-language models for benchmarks: shapes matter, weights do not.

Stock classes of transformers with a small vision encoder, made on the device that they run on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DeepseekV3Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

IMAGE = 5
"""Token id that stands for image features."""
MAX_TEXT = 8192
"""Positions beyond the visual ones that a model can count."""


def llava(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    visual_tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    intermediate: int | None = None,
    vocabulary: int = 1024,
    images: int = 1,
    spread: float = 0.02,
    device: str = "cpu",
    rank: int = 0,
) -> LlavaForConditionalGeneration:
    """A LLaVA with a two-layer vision encoder and a Llama decoder of the given shape.

    Args:
        visual_tokens: of a prompt, in ``images`` square images of equal size.
        intermediate: width of the MLP; 8/3 of ``hidden``, as in Llama, by default.
        spread: standard deviation of the decoder's weights.
        rank: a decoder of DeepSeek-V3 instead, without experts, whose cache holds this many latents a token and a
            rotated key of 64; keys and values of a head are 128 wide besides.

    Raises:
        ValueError: ``visual_tokens`` are not that many squares.
    """
    side = round((visual_tokens / images) ** 0.5)
    if side * side * images != visual_tokens:
        raise ValueError(f"visual_tokens must be {images} equal squares, got {visual_tokens}")
    shared: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate or hidden * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": visual_tokens + MAX_TEXT,
        "initializer_range": spread,
    }
    latent = {"kv_lora_rank": rank, "q_lora_rank": None, "qk_rope_head_dim": 64, "first_k_dense_replace": layers}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=14 * side,
            patch_size=14,
        ),
        text_config=DeepseekV3Config(**shared, **latent) if rank else LlamaConfig(**shared),
        image_token_index=IMAGE,
        image_seq_length=side * side,
        tie_word_embeddings=False,
    )
    return _made(LlavaForConditionalGeneration, config, dtype, device)


def qwen(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    visual_tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    intermediate: int,
    vocabulary: int,
    spread: float = 0.02,
    device: str = "cpu",
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL whose decoder has the given shape, and whose vision encoder is not meant to be run."""
    pairs = hidden // heads // 2
    side = 3 * pairs // 8  # of the pairs of a head: time, height, width
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [pairs - 2 * side, side, side]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": visual_tokens + MAX_TEXT,
            "rope_parameters": rope,
            "initializer_range": spread,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return _made(Qwen2_5_VLForConditionalGeneration, config, dtype, device)


def _made(model_class: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model with the weights of its own initialisation, the same ones each time, and no copy of them elsewhere."""
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(model: LlavaForConditionalGeneration, batch: int, text: int = 32, images: int = 1) -> dict[str, Tensor]:
    """``images`` images between two halves of ``text`` tokens, in every row; on the model's device."""
    visual = model.config.image_seq_length * images
    known = min(1000, model.config.get_text_config().vocab_size)
    ids = torch.randint(10, known, (batch, text + visual), generator=torch.Generator().manual_seed(1))
    ids[:, text // 2 : text // 2 + visual] = IMAGE
    size = model.config.vision_config.image_size
    pixels = torch.randn(batch * images, 3, size, size, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}
