"""FastVLM: convolutional tower, two-layer projector, Qwen2 decoder (biased q/k/v) with GQA 4/2.

Special: the tower's output is a feature map [images, channels, height, width], whose cells are the tokens: 16 an image.
The real tower (FastViT) is one of timm's, which this project does not need: a ConvNeXt stands in for it, and unlike the
real one has no attention at all.
"""

import torch
from transformers import ConvNextConfig, FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Config

from tests.zoo._base import DECODER, IMAGE, ZooModel, build, image_tokens, stacked_inputs

SIDE, PATCH, WIDTHS = 32, 4, [16, 32]
TOKENS = (SIDE // PATCH // 2) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    tower = ConvNextConfig(patch_size=PATCH, image_size=SIDE, hidden_sizes=WIDTHS, depths=[1, 1], num_stages=2)
    tower.hidden_size = WIDTHS[-1]  # where timm's have it
    config = FastVlmConfig(
        vision_config=tower,
        text_config=Qwen2Config(**DECODER),
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
    )
    implementations = {"": attn_implementation, "text_config": attn_implementation, "vision_config": "eager"}
    return build(FastVlmForConditionalGeneration, config, implementations, dtype, seed)


MODEL = ZooModel(
    name="fast_vlm",
    make=make,
    inputs=stacked_inputs([IMAGE] * TOKENS, SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=0,
)
