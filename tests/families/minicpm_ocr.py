"""MiniCPM-OCR: the tower of MiniCPM-V 4.6 without the merge in its middle, Qwen3.5 decoder.

Special: pages of text keep four times as many tokens: patches are merged two by two once, by the projector alone (6 and
16 tokens). Decoder as in `qwen3_5`, with plain positions.
"""

import dataclasses

import torch
from transformers import MiniCPMOcrConfig, MiniCPMOcrForConditionalGeneration, Qwen3_5TextConfig

from tests.families import minicpmv4_6, qwen3_5
from tests.zoo import _qwen
from tests.zoo._base import IMAGE, VIDEO, VISION, build, dtype_of


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = MiniCPMOcrConfig(
        text_config=Qwen3_5TextConfig(**qwen3_5.TEXT),
        vision_config={**VISION, "image_size": 16 * _qwen.PATCH, "patch_size": _qwen.PATCH},
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    return build(MiniCPMOcrForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    made = _qwen.inputs(model, batch, seed, first, frames=1)
    out = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
    if "pixel_values" in made:
        patches = made["pixel_values"].unflatten(1, (3, _qwen.PATCH, _qwen.PATCH))
        strip = patches.permute(1, 2, 0, 3).flatten(2)[None]
        out |= {"pixel_values": strip.to(dtype_of(model)), "target_sizes": made["image_grid_thw"][:, 1:].int()}
    return out


MODEL = dataclasses.replace(minicpmv4_6.MODEL, name="minicpm_ocr", make=make, inputs=inputs, vision_sites=2)
