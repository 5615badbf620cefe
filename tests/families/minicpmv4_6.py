"""MiniCPM-V 4.6: SigLIP tower on packed images of any size, merged two by two in its middle, Qwen3.5 decoder.

Special: patches of all images lie side by side in one strip; a layer that attends within windows of 2 x 2 patches
merges them between two layers of the tower, and the projector once more (6 and 16 tokens). Decoder as in `qwen3_5`,
with plain positions.
"""

import dataclasses

import torch
from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, Qwen3_5TextConfig

from tests.families import qwen3_5
from tests.zoo._base import IMAGE, VIDEO, VISION, VISION_END, VISION_START, build, dtype_of, pixels, prompt

PATCH, MERGE = 4, 4
SIZES = {"A": (8, 12), "B": (16, 16)}  # patches: height, width


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = MiniCPMV4_6Config(
        text_config=Qwen3_5TextConfig(**qwen3_5.TEXT),
        vision_config={**VISION, "image_size": 16 * PATCH, "patch_size": PATCH, "insert_layer_id": 0},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return build(MiniCPMV4_6ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        height, width = SIZES[size]
        tokens = [VISION_START, *[IMAGE] * (height * width // MERGE**2), VISION_END]
        return tokens, (pixels(generator, 3, PATCH, height * width * PATCH), SIZES[size])

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        strips, sizes = zip(*made.flat_images, strict=True)
        strip = torch.cat(strips, dim=-1)[None]
        out |= {"pixel_values": strip.to(dtype_of(model)), "target_sizes": torch.tensor(sizes, dtype=torch.int32)}
    return out


MODEL = dataclasses.replace(qwen3_5.MODEL, name="minicpmv4_6", make=make, inputs=inputs, vision_sites=3)
