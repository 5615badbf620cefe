"""KOSMOS-2: CLIP tower, a resampler to 16 tokens, Magneto decoder (MHA 4/4, norms inside attention and feed-forward).

Special: an image's place is told by `image_embeds_position_mask`, not by a token id, and its features are written by
an indexed assignment. `generate` is the model's own: it runs the tower itself and calls `generate` of the *text
model*, so a compiled `forward` of the whole is never called. Masks are built by the model, additive and as wide as
what is cached. Positions are sinusoids, counted from the token ids. One image a row.
"""

import torch
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2TextConfig, Kosmos2VisionConfig

from tests.zoo._base import (
    BOS,
    EOS,
    FIRST_TEXT,
    IMAGE,
    LAST_TEXT,
    PAD,
    VISION,
    VISION_END,
    VISION_START,
    VOCAB,
    ZooModel,
    build,
    dtype_of,
    pixels,
)

SIDE, PATCH, TOKENS = 16, 4, 16
BEFORE, AFTER = 3, 14
"""Text tokens of a row: all rows are alike."""


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = Kosmos2TextConfig(
        vocab_size=VOCAB,
        max_position_embeddings=1024,
        embed_dim=64,
        layers=4,
        ffn_dim=96,
        attention_heads=4,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    vision = Kosmos2VisionConfig(**VISION, image_size=SIDE, patch_size=PATCH)
    config = Kosmos2Config(text_config=text, vision_config=vision, latent_query_num=TOKENS, tie_word_embeddings=False)
    model = build(Kosmos2ForConditionalGeneration, config, attn_implementation, dtype, seed, embed_std=1 / 8)
    generation = model.text_model.generation_config  # the one that counts
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
    return model


def inputs(model, batch=1, seed=0, first=0):
    rows, images = [], []
    for index in range(first, first + batch):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        text = torch.randint(FIRST_TEXT, LAST_TEXT + 1, (BEFORE + AFTER,), generator=generator).tolist()
        rows.append([BOS, *text[:BEFORE], VISION_START, *[IMAGE] * TOKENS, VISION_END, *text[BEFORE:]])
        images.append(pixels(generator, 3, SIDE, SIDE))
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.stack(images).to(dtype_of(model)),
        "image_embeds_position_mask": (ids == IMAGE).long(),
    }


MODEL = ZooModel(
    name="kosmos-2",
    make=make,
    inputs=inputs,
    visual_positions=lambda model, inputs: inputs["image_embeds_position_mask"] == 1,
    decoder_prefix="text_model.model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=3,
    ragged=False,
    static_cache=False,
    padding_exact=False,
    notes="The model wants an image in every row. Its masks are as wide as what is cached: no static cache. "
    "In decode it counts positions by all tokens fed, padding included.",
)
