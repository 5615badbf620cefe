"""Llama 4: tower with a CLS token and pixel shuffle, decoder whose chunked layers rotate and full ones do not, experts.

Special: three layers of four are chunked: a token sees its own chunk of 16 alone, which is less than an image and its
text. The fourth is full and has no positions (NoPE); its queries are scaled by where they stand (`floor_scale`, here
short enough to matter), padding included. Queries and keys are normed behind the rotation, which is complex. The first
expert layer adds a shared expert to routed ones.
"""

import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration
from transformers.models.llama4 import Llama4TextConfig, Llama4VisionConfig

from tests.zoo._base import (
    DECODER,
    IMAGE,
    VISION,
    VISION_END,
    VISION_START,
    ZooModel,
    build,
    image_tokens,
    stacked_inputs,
)

SIDE, PATCH = 32, 4
TOKENS = (SIDE // PATCH // 2) ** 2
KINDS = ("chunked", "chunked", "chunked", "full", "chunked", "full")


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = Llama4TextConfig(
        **{**DECODER, "num_hidden_layers": len(KINDS)},
        intermediate_size_mlp=96,
        head_dim=16,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        no_rope_layers=[int(kind == "chunked") for kind in KINDS],
        attention_chunk_size=16,
        floor_scale=16,
    )
    vision = Llama4VisionConfig(
        **{**VISION, "intermediate_size": 128},  # what the pixel shuffle makes of 2 x 2 patches
        image_size=SIDE,
        patch_size=PATCH,
        projector_input_dim=48,
        projector_output_dim=48,
        vision_output_dim=48,
    )
    config = Llama4Config(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    return build(Llama4ForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="llama4",
    make=make,
    inputs=stacked_inputs([VISION_START, *[IMAGE] * TOKENS, VISION_END], SIDE),
    visual_positions=image_tokens,
    decoder_prefix="language_model.model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    padding_exact=False,
    notes="The temperature of full layers counts padding.",
)
