"""DeepSeek-VL: SigLIP tower, two-layer aligner, Llama decoder without GQA (MHA 4/4, as the real ones).

Special: every patch of the tower is a token (25 an image), and images come as [images, 3, side, side] spliced in by
`masked_scatter`. The processor writes image tokens bare, without start and end tokens.
"""

import torch
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, LlamaConfig, SiglipVisionConfig

from tests.zoo._base import DECODER, IMAGE, VISION, ZooModel, build, image_tokens, stacked_inputs

SIDE, PATCH = 20, 4
TOKENS = (SIDE // PATCH) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=LlamaConfig(**{**DECODER, "num_key_value_heads": 4}),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return build(DeepseekVLForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="deepseek_vl",
    make=make,
    inputs=stacked_inputs([IMAGE] * TOKENS, SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=2,
)
