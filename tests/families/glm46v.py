"""GLM-4.6V: the tower and the decoder of GLM-4.1V in a model class of their own; videos alone differ.

Special: as `glm4v`.
"""

import dataclasses

import torch
from transformers import Glm4vTextConfig, Glm4vVisionConfig, Glm46VConfig, Glm46VForConditionalGeneration

from tests.families import glm4v
from tests.zoo._base import build


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text, tower = Glm4vTextConfig(**glm4v.TEXT), Glm4vVisionConfig(**glm4v.TOWER)
    config = Glm46VConfig(text_config=text, vision_config=tower, **glm4v.IDS)
    return build(Glm46VForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(glm4v.MODEL, name="glm46v", make=make)
