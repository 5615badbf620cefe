"""Chameleon: images become tokens of the vocabulary (VQ-VAE), one decoder for both, GQA 4/2 as in the 34B.

Special: no vision tower and no text configuration: the decoder's fields are those of the model. Codes become token ids
by a table on the CPU, and their embeddings are spliced in by `masked_scatter`. Queries and keys are layer-normed with
a weight per head. Logits of image tokens are set to the lowest float. 16 tokens an image.
"""

import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonVQVAEConfig

from tests.zoo._base import (
    DECODER,
    IMAGE,
    VISION_END,
    VISION_START,
    VOCAB,
    ZooModel,
    build,
    image_tokens,
    stacked_inputs,
)

SIDE, FACTOR, CODES = 8, 2, 32
TOKENS = (SIDE // FACTOR) ** 2
VOCABULARY = {
    "<image>": IMAGE,
    **{f"IMGIMG{''.join(chr(ord('A') + int(d)) for d in str(code))}Z": VOCAB + code for code in range(CODES)},
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = ChameleonConfig(
        **{**DECODER, "vocab_size": VOCAB + CODES},
        vq_config=ChameleonVQVAEConfig(
            embed_dim=8,
            num_embeddings=CODES,
            latent_channels=8,
            resolution=SIDE,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
        ),
        vocabulary_map=VOCABULARY,
    )
    model = build(ChameleonForConditionalGeneration, config, attn_implementation, dtype, seed)
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:  # matrices here: bring their weights to 1.4 and their biases to 0
            parameter.mul_(0.4).add_(1.4 if name.endswith("weight") else 0)
    return model


MODEL = ZooModel(
    name="chameleon",
    make=make,
    inputs=stacked_inputs([VISION_START, *[IMAGE] * TOKENS, VISION_END], SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=1,
)
