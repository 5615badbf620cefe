"""Inkling 2: a tower of patches, decoder of sliding layers and full ones as in Inkling (GQA 4/1 and 4/2), with sinks.

Special: each token makes a sink of its own for every head, a logit behind the keys that takes weight and gives nothing;
the model attends eagerly, there is no other way. Residuals are attended to block by block. Queries and keys are clipped
by their norm, logits and experts soft-capped. What a token adds to its logits by distance, the short convolutions and
experts as in Inkling.
"""

import dataclasses

import torch
from transformers import Inkling2Config, Inkling2ForConditionalGeneration

from tests.families import inkling
from tests.zoo._base import DECODER, IMAGE, VISION, VISION_START, VOCAB, build, dtype_of, pixels, prompt

PATCH, MERGE = 4, 2
GRIDS = {"A": (1, 2, 3), "B": (1, 4, 4)}


def make(attn_implementation="eager", dtype=torch.float32, seed=0):
    text = {
        **{**DECODER, "num_hidden_layers": len(inkling.KINDS), "num_key_value_heads": 1},
        "unpadded_vocab_size": VOCAB,
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "layer_types": [inkling.LAYERS[kind] for kind in inkling.KINDS],
        "sliding_window_size": 8,
        "rel_extent": 16,
        "d_rel": 8,
        "n_layers_per_attn_res_block": 2,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "route_scale": 2.0,
    }
    del text["intermediate_size"]
    config = Inkling2Config(
        text_config=text,
        vision_config={
            **VISION,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "posemb_grid_size": 8,
            "projection_hidden_dim": 48,
            "text_hidden_size": DECODER["hidden_size"],
        },
        image_token_id=IMAGE,
    )
    return build(Inkling2ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        _, height, width = GRIDS[size]
        side = MERGE * PATCH
        patches = pixels(generator, height * width, side, side, 3)
        return [VISION_START, *[IMAGE] * (height * width)], (patches, GRIDS[size])

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        patches, grids = zip(*made.flat_images, strict=True)
        out |= {"pixel_values": torch.cat(patches).to(dtype_of(model)), "image_grid_thw": torch.tensor(grids)}
    return out


MODEL = dataclasses.replace(inkling.MODEL, name="inkling2", make=make, inputs=inputs, vision_sites=2)
