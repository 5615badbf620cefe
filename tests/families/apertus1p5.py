"""Apertus 1.5: images and audio become tokens of the vocabulary (IBQ, WavTokenizer), a Llama-like decoder (GQA 4/2).

Special: codes have ids behind the text's, and their *embeddings* are spliced in at placeholders; the output head knows
text alone. Queries and keys are normed, the MLP has no gate (xIELU). Each image is encoded at its own size, cut out of
pixels that are padded to the largest: 6 and 16 tokens. The audio encoder exists and is not run. From transformers 5.24.
"""

import torch
from torch.nn.functional import pad
from transformers import Apertus1p5Config, Apertus1p5ForConditionalGeneration

from tests.zoo._base import (
    DECODER,
    IMAGE,
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

FACTOR, CANVAS = 4, 16
CODES, SOUNDS = 32, 16
SIZES = {"A": (8, 12), "B": (16, 16)}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Apertus1p5Config(
        text_config={
            **DECODER,
            "vocab_size": VOCAB + CODES + SOUNDS,
            "output_vocab_size": VOCAB,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "codebook_size": CODES,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [4],
            "resolution": CANVAS,
        },
        audio_config={
            "model_type": "wavtokenizer_encoder",
            "num_filters": 4,
            "hidden_size": 16,
            "codebook_dim": 16,
            "codebook_size": SOUNDS,
            "upsampling_ratios": [2, 2],
            "decoder_hidden_size": 32,
        },
        image_token_id=IMAGE,
        audio_token_id=VOCAB - 1,
        image_token_offset=VOCAB,
        audio_token_offset=VOCAB + CODES,
    )
    attends = {"text_config": attn_implementation, "vision_config": "eager", "audio_config": "eager"}
    return build(Apertus1p5ForConditionalGeneration, config, attends, dtype, seed)  # type: ignore[arg-type]


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        height, width = SIZES[size]
        tokens = [VISION_START, *[IMAGE] * (height // FACTOR * (width // FACTOR)), VISION_END]
        room = (0, CANVAS - width, 0, CANVAS - height)
        return tokens, (pad(pixels(generator, 1, 3, height, width), room), SIZES[size])

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        values, sizes = zip(*made.flat_images, strict=True)
        out |= {"pixel_values": torch.cat(values).to(dtype_of(model)), "image_sizes": torch.tensor(sizes)}
    return out


MODEL = ZooModel(
    name="apertus1p5",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=1,
    mixed_sizes=True,
)
