"""Images and questions to model inputs, and generated tokens back to text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from .convert import IMAGE_TOKEN

# ImageNet statistics, which the vision encoder was trained with
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def to_bytes(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """[B, 3, size, size] uint8; every image is stretched to a square."""
    squares = [image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares])


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, S, S] float32 of bytes, as the vision encoder takes them, on the same device."""
    return (pixels.float() / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)


def to_pixels(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """[B, 3, size, size] float32, normalised; every image is stretched to a square."""
    return normalised(to_bytes(images, size))


class PetiteProcessor:
    """One image and one question a row."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_size: int = 168, patch_size: int = 14) -> None:
        if image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of {patch_size}, got {image_size}")
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.image_tokens = (image_size // patch_size) ** 2

    def prompt(self, question: str) -> str:
        """The chat-formatted prompt of one question, image tokens first."""
        content = f"{IMAGE_TOKEN * self.image_tokens}\n{question}"
        turn = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def prepare(self, images: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` [B, L] int64, padded on the left; `pixel_values` [B, 3, S, S] float32."""
        if len(images) != len(questions) or not images:
            raise ValueError(f"one image a question is needed, got {len(images)} images, {len(questions)} questions")
        prompts = [self.prompt(question) for question in questions]
        text = self.tokenizer(
            prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False
        )
        return {
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "pixel_values": to_pixels(images, self.image_size),
        }

    def decode(self, output_ids: torch.Tensor, prompt_length: int = 0) -> list[str]:
        """The answers in `generate`'s output [B, L + new]; `prompt_length` is L (`input_ids.shape[1]`)."""
        texts = self.tokenizer.batch_decode(output_ids[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]
