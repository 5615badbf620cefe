"""Cohere 2 Vision (Command A): SigLIP tower with pixel shuffle, decoder of three sliding layers and a full one.

Special: attention and MLP of a layer read the same norm and are added together (parallel block). Sliding layers rotate
interleaved pairs; full ones have no positions at all (NoPE). Norms are LayerNorms without a bias. Logits are scaled.
"""

import torch
from transformers import Cohere2Config, Cohere2VisionConfig, Cohere2VisionForConditionalGeneration, SiglipVisionConfig

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
KINDS = ("sliding", "sliding", "sliding", "full") * 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=Cohere2Config(**{**DECODER, "num_hidden_layers": len(KINDS)}, sliding_window=8),
        image_token_id=IMAGE,
        alignment_intermediate_size=96,
        tie_word_embeddings=False,
    )
    return build(Cohere2VisionForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="cohere2_vision",
    make=make,
    inputs=stacked_inputs([VISION_START, *[IMAGE] * TOKENS, VISION_END], SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
)
