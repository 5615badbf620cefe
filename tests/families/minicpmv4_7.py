"""MiniCPM-V 4.7: tower and decoder of MiniCPM-V 4.6, positions of three axes.

Special: a picture is a thumbnail, or one and slices that tile it. Positions come from its markers: all of them lie on
one canvas, over which the thumbnail is stretched, so that tokens share positions. "A" is a thumbnail of 6 tokens, "B"
one of 4 with two slices of 6: three visual spans.
"""

import dataclasses

import torch
from transformers import MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration, Qwen3_5TextConfig

from tests.families import minicpmv4_6, qwen3_5
from tests.zoo._base import (
    IMAGE,
    VIDEO,
    VISION,
    VISION_END,
    VISION_START,
    build,
    dtype_of,
    pixels,
    prompt,
)

PATCH, MERGE = minicpmv4_6.PATCH, minicpmv4_6.MERGE
SIZES = {"A": [(8, 12)], "B": [(8, 8), (12, 8), (12, 8)]}  # patches of the thumbnail and of slices: height, width
SLICE_START, SLICE_END, NEWLINE = 247, 248, 249


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = MiniCPMV4_7Config(
        text_config=Qwen3_5TextConfig(**qwen3_5.TEXT),
        vision_config={**VISION, "image_size": 16 * PATCH, "patch_size": PATCH},
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_id=VISION_START,
        image_end_id=VISION_END,
        slice_start_id=SLICE_START,
        slice_end_id=SLICE_END,
        newline_id=NEWLINE,
    )
    return build(MiniCPMV4_7ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        tokens, markers, strips = [], (VISION_START, VISION_END), []
        for height, width in SIZES[size]:
            tokens += [markers[0], *[IMAGE] * (height * width // MERGE**2), markers[1]]
            markers = SLICE_START, SLICE_END
            strips.append(pixels(generator, 3, PATCH, height * width * PATCH))
        return tokens, (torch.cat(strips, dim=-1), SIZES[size])

    made = prompt(image, batch, seed, first)
    out = {
        "input_ids": made.input_ids,
        "attention_mask": made.attention_mask,
        "mm_token_type_ids": (made.input_ids == IMAGE).int(),
    }
    if made.flat_images:
        strips, sizes = zip(*made.flat_images, strict=True)
        strip = torch.cat(strips, dim=-1)[None]
        sizes = torch.tensor([size for crops in sizes for size in crops], dtype=torch.int32)
        out |= {"pixel_values": strip.to(dtype_of(model)), "target_sizes": sizes}
    return out


MODEL = dataclasses.replace(minicpmv4_6.MODEL, name="minicpmv4_7", make=make, inputs=inputs)
