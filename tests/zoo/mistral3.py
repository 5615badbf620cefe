"""Mistral 3: Pixtral tower (2-D RoPE, all images packed into one masked sequence), Mistral decoder.

Special: images differ in size (6 and 12 tokens) and their rows are separated by break tokens, so an image is several
visual spans. `head_dim` is 24, which is not hidden size / heads.
"""

import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

from tests.zoo._base import (
    DECODER,
    IMAGE,
    ROW_BREAK,
    VISION,
    VISION_END,
    ZooModel,
    build,
    dtype_of,
    image_tokens,
    pixels,
    prompt,
)

PATCH, MERGE = 4, 2
SIZES = {"A": (16, 24), "B": (24, 32)}
LARGEST = (24, 32)


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, image_size=max(LARGEST), patch_size=PATCH),
        text_config=MistralConfig(**DECODER, head_dim=24, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=MERGE,
        tie_word_embeddings=False,
    )
    return build(Mistral3ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        height, width = SIZES[size]
        row = [*[IMAGE] * (width // PATCH // MERGE), ROW_BREAK]
        tokens = row * (height // PATCH // MERGE)
        canvas = torch.zeros(3, *LARGEST)
        canvas[:, :height, :width] = pixels(generator, 3, height, width)
        return [*tokens[:-1], VISION_END], (canvas, SIZES[size])

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        canvases, sizes = zip(*made.flat_images, strict=True)
        out |= {"pixel_values": torch.stack(canvases).to(dtype_of(model)), "image_sizes": torch.tensor(sizes)}
    return out


MODEL = ZooModel(
    name="mistral3",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=24,
    vision_sites=2,
    mixed_sizes=True,
)
