"""Aria: Idefics 3 tower, a projector with 9 learned queries that attend to its patches, a decoder of experts (GQA 4/2).

Special: two of four routed experts for each token, and shared ones; weights of experts are stored the other way round.
"""

import torch
from transformers import AriaConfig, AriaForConditionalGeneration, AriaTextConfig, Idefics3VisionConfig

from tests.zoo._base import DECODER, IMAGE, VISION, ZooModel, build, image_tokens, stacked_inputs

SIDE, PATCH, QUERIES = 24, 4, 9


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = AriaConfig(
        vision_config=Idefics3VisionConfig(**VISION, image_size=SIDE, patch_size=PATCH),
        text_config=AriaTextConfig(**DECODER, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        projector_patch_to_query_dict={(SIDE // PATCH) ** 2: QUERIES},
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return build(AriaForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="aria",
    make=make,
    inputs=stacked_inputs([IMAGE] * QUERIES, SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
)
