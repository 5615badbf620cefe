"""Granite Docling: SigLIP-like tower, pixel shuffle with learned layers around it, Granite decoder with GQA 4/2.

Special: features of two layers of the tower are added behind decoder layers 0 and 1 by boolean indexing (deepstack).
Tiles as in `idefics3`, with a mask of whole tiles: rows with fewer are padded with ones that the model throws out. The
fine path (four times as many tokens a tile) exists and is not run. Scales of attention, embeddings, residuals and
logits are the configuration's.
"""

import dataclasses

import torch
from transformers import (
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    GraniteDoclingTextConfig,
    GraniteDoclingVisionConfig,
)

from tests.families import idefics3
from tests.zoo._base import DECODER, IMAGE, PAD, VISION, build


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = GraniteDoclingConfig(
        text_config=GraniteDoclingTextConfig(
            **DECODER, attention_multiplier=0.25, embedding_multiplier=1.5, residual_multiplier=0.5
        ),
        vision_config=GraniteDoclingVisionConfig(
            **VISION,
            image_size=idefics3.SIDE,
            patch_size=idefics3.PATCH,
            scale_factor=idefics3.SCALE,
            out_hidden_size=DECODER["hidden_size"],
            deepstack_visual_indexes=[0, 1],
        ),
        image_token_id=IMAGE,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return build(GraniteDoclingForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    made = idefics3.inputs(model, batch, seed, first)
    if "pixel_values" in made:
        made["pixel_attention_mask"] = made["pixel_attention_mask"].flatten(2).any(-1)
    return made


MODEL = dataclasses.replace(idefics3.MODEL, name="granite_docling", make=make, inputs=inputs)
