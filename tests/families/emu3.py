"""Emu3: images become tokens of the vocabulary (VQ-VAE), the decoder is Llama-like with GQA 4/2.

Special: no features are projected. A VQ-VAE turns an image into codes, a table on the CPU turns codes into token ids
with an end-of-line token after every row, and their *embeddings* are spliced in by `masked_scatter`. An image is an
image of `temporal_downsample_factor` equal frames. Sizes differ: 20 tokens for 4 x 4 codes, 28 for 4 x 6; pixels are
padded to the larger one.
"""

import torch
from torch.nn.functional import pad
from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3TextConfig, Emu3VQVAEConfig

from tests.zoo._base import (
    DECODER,
    IMAGE,
    ROW_BREAK,
    VISION_END,
    VISION_START,
    VOCAB,
    ZooModel,
    build,
    dtype_of,
    image_tokens,
    pixels,
    prompt,
)

FACTOR, CODES = 2, 32
SIZES = {"A": (8, 8), "B": (8, 12)}
CANVAS = 12
VOCABULARY = {
    "<image>": IMAGE,
    "<|extra_200|>": ROW_BREAK,
    **{f"<|visual token {code:06d}|>": VOCAB + code for code in range(CODES)},
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Emu3Config(
        text_config=Emu3TextConfig(**{**DECODER, "vocab_size": VOCAB + CODES}),
        vq_config=Emu3VQVAEConfig(
            codebook_size=CODES,
            embed_dim=4,
            latent_channels=4,
            temporal_downsample_factor=2,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            attn_resolutions=[],
            hidden_size=32,
        ),
        vocabulary_map=VOCABULARY,
    )
    return build(Emu3ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        height, width = SIZES[size]
        tokens = [VISION_START, *[IMAGE] * (height // FACTOR * (width // FACTOR + 1)), VISION_END]
        return tokens, (pad(pixels(generator, 1, 3, height, width), (0, CANVAS - width)), SIZES[size])

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        values, sizes = zip(*made.flat_images, strict=True)
        out |= {"pixel_values": torch.cat(values).to(dtype_of(model)), "image_sizes": torch.tensor(sizes)}
    return out


MODEL = ZooModel(
    name="emu3",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.text_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=1,
    mixed_sizes=True,
)
