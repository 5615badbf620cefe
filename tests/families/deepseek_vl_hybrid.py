"""DeepSeek-VL with two towers: SigLIP on a small picture, SAM on a large one, side by side in every token (MHA 4/4).

Special: SAM's last layer and its last global one are added, interpolated to four times SigLIP's grid and convolved down
to it; both towers' features are projected to half of the width each and joined. The rest is as in `deepseek_vl`.
"""

import dataclasses

import torch
from transformers import (
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    LlamaConfig,
    SamVisionConfig,
    SiglipVisionConfig,
)

from tests.families.deepseek_vl import MODEL as ONE_TOWER
from tests.families.deepseek_vl import PATCH, SIDE, TOKENS
from tests.zoo._base import DECODER, IMAGE, VISION, build, stacked_inputs

LARGE = 32


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    large = SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=LARGE,
        patch_size=PATCH,
        window_size=6,
        global_attn_indexes=[1],
        mlp_dim=48,
    )
    config = DeepseekVLHybridConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        high_res_vision_config=large,
        text_config=LlamaConfig(**{**DECODER, "num_key_value_heads": 4}),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return build(DeepseekVLHybridForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    made = stacked_inputs([IMAGE] * TOKENS, SIDE)(model, batch, seed, first)
    if "pixel_values" in made:
        small = made["pixel_values"]
        made["high_res_pixel_values"] = torch.nn.functional.interpolate(small, (LARGE, LARGE))
    return made


MODEL = dataclasses.replace(
    ONE_TOWER, name="deepseek_vl_hybrid", make=make, inputs=inputs, vision_sites=ONE_TOWER.vision_sites + 2
)
