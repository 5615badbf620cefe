"""ERNIE 4.5 VL: experts for text, others for images, and shared ones; images are resampled in space and time.

Special: the tokens of a prompt are sorted by modality into two sets of experts, by boolean indexing; a decode step has
text alone. The first layer is dense. M-RoPE rotates by height and width in turns, then by time. Patches of images are
packed and have no time of their own; sizes differ (6 and 16 tokens).
"""

import torch
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import VIDEO, VISION_END, VISION_START, ZooModel, build, image_tokens


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = {
        **_qwen.TEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [48, 32],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
    }
    tower = {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "patch_size": _qwen.PATCH,
        "spatial_merge_size": _qwen.MERGE,
    }
    config = Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=_qwen.IDS["image_token_id"],
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=VISION_START,
        video_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return build(Ernie4_5_VLMoeForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    made = _qwen.inputs(model, batch, seed, first, frames=1)
    return made | {"moe_mm_token_type_ids": made["mm_token_type_ids"]}


MODEL = ZooModel(
    name="ernie4_5_vl_moe",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
    no_cache=False,
    notes="Without a cache, `generate` does not extend `moe_mm_token_type_ids` by what it has generated.",
)
