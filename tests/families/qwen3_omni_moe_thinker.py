"""Qwen3-Omni's thinker: the tower and decoder of Qwen3-VL-MoE, and an audio encoder beside the tower.

Special: deepstack by boolean indexing and experts as in `qwen3_vl_moe`; prompts as in `qwen2_5_omni_thinker`, where a
clip becomes 3 tokens behind three convolutions.
"""

import dataclasses
import functools

import torch
from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

from tests.families import qwen2_5_omni_thinker, qwen3_vl_moe
from tests.families.qwen2_5_omni_thinker import AUDIO, AUDIO_START, MELS
from tests.zoo import _qwen, qwen3_vl
from tests.zoo._base import IMAGE, VISION_START, build

CLIP = 3


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = {**_qwen.TEXT, "num_hidden_layers": qwen3_vl_moe.LAYERS, "head_dim": 16, **qwen3_vl_moe.EXPERTS}
    audio = {
        "num_mel_bins": MELS,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "d_model": 32,
        "max_source_positions": 64,
        "downsample_hidden_size": 16,
        "output_dim": text["hidden_size"],
    }
    config = Qwen3OmniMoeThinkerConfig(
        text_config=text,
        vision_config=qwen3_vl.TOWER,
        audio_config=audio,
        image_token_id=IMAGE,
        video_token_id=_qwen.IDS["video_token_id"],
        audio_token_id=AUDIO,
        audio_start_token_id=AUDIO_START,
        vision_start_token_id=VISION_START,
        tie_word_embeddings=False,
    )
    return build(Qwen3OmniMoeThinkerForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(
    qwen3_vl_moe.MODEL,
    name="qwen3_omni_moe_thinker",
    make=make,
    inputs=functools.partial(qwen2_5_omni_thinker.inputs, clip_tokens=CLIP),
)
