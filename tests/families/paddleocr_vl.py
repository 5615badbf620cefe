"""PaddleOCR-VL: SigLIP tower on packed patches of any size, ERNIE 4.5 decoder with M-RoPE (GQA 4/2).

Special: patches are small images, not rows; images differ in size (6 and 16 tokens), and positions of the tower are
resampled from a grid. `rope_deltas` as in Qwen2-VL.
"""

import torch
from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import VISION, ZooModel, build, image_tokens

TEXT = {**_qwen.TEXT, "head_dim": 16}
TOWER = {**VISION, "image_size": 32, "patch_size": _qwen.PATCH, "spatial_merge_size": _qwen.MERGE}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = PaddleOCRVLConfig(text_config=TEXT, vision_config=TOWER, **_qwen.IDS)
    return build(PaddleOCRVLForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    made = _qwen.inputs(model, batch, seed, first, frames=1)
    if "pixel_values" in made:
        made["pixel_values"] = made["pixel_values"].unflatten(1, (3, _qwen.PATCH, _qwen.PATCH))
    return made


MODEL = ZooModel(
    name="paddleocr_vl",
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
)
