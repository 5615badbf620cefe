"""Mistral Small 4: Mistral 3's Pixtral tower, a decoder of multi-head latent attention and experts.

Special: the cache holds latents as in `kimi_k25`: 24 numbers and a rotated key of 8 a token, for 4 heads. Each layer
routes every token to 2 of 8 experts beside a shared one. Queries grow with their position (by its logarithm, here from
the 16th token on), YaRN stretches the rotation. Images as in `mistral3`: of any size, several visual spans each.
"""

import dataclasses

import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Mistral4Config, PixtralVisionConfig

from tests.zoo import mistral3
from tests.zoo._base import DECODER, IMAGE, VISION, build

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 64.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = Mistral4Config(
        **{**DECODER, "num_key_value_heads": 4},
        rope_parameters=dict(ROPE),
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        kv_lora_rank=24,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, image_size=max(mistral3.LARGEST), patch_size=mistral3.PATCH),
        text_config=text,
        image_token_index=IMAGE,
        spatial_merge_size=mistral3.MERGE,
        tie_word_embeddings=False,
    )
    return build(Mistral3ForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(mistral3.MODEL, name="mistral4", make=make, kv_heads=4)
