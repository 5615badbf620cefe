"""Janus: a SigLIP-like tower for what is seen, a VQ-VAE for what is drawn, Llama decoder without GQA (MHA 4/4).

Special: only the understanding half takes part in text generation; the VQ-VAE, its embeddings and its head are there
and idle. `generate` is the model's own: it dispatches on `generation_mode` and calls transformers' for text. 16 tokens
an image; the tower has a learned position embedding and no CLS token.
"""

import torch
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

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

SIDE, PATCH = 16, 4
TOKENS = (SIDE // PATCH) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    tower = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    config = JanusConfig(
        text_config=LlamaConfig(**{**DECODER, "num_key_value_heads": 4}),
        vision_config=JanusVisionConfig(
            **tower,
            mlp_ratio=1.5,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=DECODER["hidden_size"],
            num_image_tokens=TOKENS,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=32,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            projection_dim=DECODER["hidden_size"],
            image_token_embed_dim=DECODER["hidden_size"],
        ),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return build(JanusForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="janus",
    make=make,
    inputs=stacked_inputs([VISION_START, *[IMAGE] * TOKENS, VISION_END], SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=2,
)
