"""Granite 4 Vision: CLIP tower, windows of patches that learned queries attend to, Granite decoder with GQA 4/2.

Special: embeddings of image tokens are zero; their features are added in front of several decoder layers by boolean
indexing, those of two layers of the tower and of four offsets within its windows. Images are tiles as in `llava_next`.
Scales of attention, embeddings and logits are the configuration's.
"""

import dataclasses

import torch
from transformers import (
    CLIPVisionConfig,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionTextConfig,
)

from tests.families import llava_next
from tests.zoo._base import DECODER, IMAGE, VISION, build
from tests.zoo._tiles import SIDE

LAYERS = 7


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Granite4VisionConfig(
        vision_config=CLIPVisionConfig(
            **{**VISION, "hidden_size": 64}, image_size=SIDE, patch_size=SIDE // 4, projection_dim=32
        ),
        text_config=Granite4VisionTextConfig(
            **{**DECODER, "num_hidden_layers": LAYERS}, attention_multiplier=0.25, embedding_multiplier=1.5
        ),
        image_token_index=IMAGE,
        image_grid_pinpoints=llava_next.PINPOINTS,
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 1], [-1, 0]],
        spatial_target_layers=[2, 3, 4, 5],
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48},
    )
    return build(Granite4VisionForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(llava_next.MODEL, name="granite4_vision", make=make, attention_kinds=("full",) * LAYERS)
