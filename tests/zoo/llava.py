"""LLaVA 1.5: CLIP tower without its CLS token, two-layer projector, Llama decoder with GQA 4/2.

Special: images are all of one size (16 tokens each), spliced in by `masked_scatter`.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.zoo._base import DECODER, IMAGE, VISION, ZooModel, build, image_tokens, stacked_inputs

SIDE, PATCH = 32, 8
TOKENS = (SIDE // PATCH) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(**DECODER),
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
    )
    return build(LlavaForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="llava",
    make=make,
    inputs=stacked_inputs([IMAGE] * TOKENS, SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
)
