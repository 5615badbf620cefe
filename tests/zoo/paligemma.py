"""PaliGemma: SigLIP tower, Gemma decoder with a single KV head (MQA 4/1).

Special: the whole prompt is a bidirectional prefix (`token_type_ids` 0) and only what is generated is causal. Positions
start at 1.
"""

import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from tests.zoo._base import DECODER, IMAGE, VISION, ZooModel, build, image_tokens, stacked_inputs

SIDE, PATCH = 24, 6
TOKENS = (SIDE // PATCH) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=GemmaConfig(**{**DECODER, "num_key_value_heads": 1}, head_dim=16),
        image_token_index=IMAGE,
        projection_dim=DECODER["hidden_size"],
        hidden_size=DECODER["hidden_size"],
        tie_word_embeddings=False,
    )
    return build(PaliGemmaForConditionalGeneration, config, attn_implementation, dtype, seed, embed_std=1 / 8)


MODEL = ZooModel(
    name="paligemma",
    make=make,
    inputs=stacked_inputs(
        [IMAGE] * TOKENS,
        SIDE,
        extra=lambda made: {"token_type_ids": torch.zeros_like(made.input_ids)},
    ),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=1,
    head_dim=16,
    vision_sites=2,
    no_cache="_update_model_kwargs_for_generation" in vars(PaliGemmaForConditionalGeneration),
    notes="Older transformers, without a cache, count generated tokens into the bidirectional prefix.",
)
