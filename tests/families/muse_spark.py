"""Muse Spark: a tower of windowed and global layers on packed patches; sliding and full layers (GQA 4/2).

Special: sliding layers rotate, full ones have no positions at all (NoPE). q and k are normed without weights, and what
a head attends to is normed, and gated by a sigmoid of the input. A learned gate weighs what a layer adds and what
was there before. Embeddings are normed. Behind the first layer each token goes to two of four experts, which are
narrower than the model. The audio tower exists and is not run.
"""

import dataclasses

import torch
from transformers import (
    MuseSparkAudioConfig,
    MuseSparkConfig,
    MuseSparkForConditionalGeneration,
    MuseSparkTextConfig,
    MuseSparkVisionConfig,
)

from tests.families import exaone4_5
from tests.zoo import _qwen
from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION, VOCAB, build

WINDOW = 4  # patches: less than an image's height or width
KINDS = ("sliding", "full", "sliding", "full")


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = MuseSparkTextConfig(
        **DECODER,
        head_dim=16,
        sliding_window=8,
        layer_types=[f"{kind}_attention" for kind in KINDS],
        layer_rope_theta=[10000.0 * (kind == "sliding") for kind in KINDS],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        moe_hidden_size=32,
        moe_intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        qk_scale_factor=2.0,
        residual_gate_temperature=3.0,
        output_multiplier=0.5,
    )
    vision = MuseSparkVisionConfig(
        **VISION,
        patch_size=_qwen.PATCH,
        pos_emb_height=WINDOW,
        pos_emb_width=WINDOW,
        max_position_embeddings=WINDOW**2,
        patch_temporal=_qwen.TEMPORAL,
        merge_size=_qwen.MERGE,
    )
    audio = MuseSparkAudioConfig(
        patch_sizes=[4, 4],
        hidden_sizes=[16, 16],
        depths=[1, 1],
        num_hidden_layers=2,
        out_hidden_size=DECODER["hidden_size"],
    )
    config = MuseSparkConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=VOCAB - 1,
        out_hidden_size=VISION["hidden_size"] * _qwen.MERGE**2,
        projector_hidden_size=48,
        tie_word_embeddings=False,
    )
    return build(MuseSparkForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(exaone4_5.MODEL, name="muse_spark", make=make, attention_kinds=KINDS)
