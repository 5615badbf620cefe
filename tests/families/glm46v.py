"""GLM-4.6V: the tower and the decoder of GLM-4.1V in a model class of their own; videos alone differ.

Special: as `glm4v`.
"""

import torch
from transformers import Glm4vTextConfig, Glm4vVisionConfig, Glm46VConfig, Glm46VForConditionalGeneration

from tests.families.glm4v import IDS, TEXT, TOWER
from tests.zoo import _qwen
from tests.zoo._base import ZooModel, build, image_tokens


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Glm46VConfig(text_config=Glm4vTextConfig(**TEXT), vision_config=Glm4vVisionConfig(**TOWER), **IDS)
    return build(Glm46VForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="glm46v",
    make=make,
    inputs=_qwen.inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
