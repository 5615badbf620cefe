"""ViP-LLaVA: CLIP tower without its CLS token, Vicuna decoder (MHA 4/4).

Special: an image's features are those of five layers of the tower side by side, normed before they are projected.
Images are all of one size (16 tokens each).
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

from tests.zoo._base import DECODER, IMAGE, VISION, ZooModel, build, image_tokens, stacked_inputs

SIDE, PATCH, TOWER = 32, 8, 10  # no fewer layers have a -11th hidden state
TOKENS = (SIDE // PATCH) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    tower = {**VISION, "num_hidden_layers": TOWER}
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(**{**DECODER, "num_key_value_heads": 4}),
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
    )
    return build(VipLlavaForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="vipllava",
    make=make,
    inputs=stacked_inputs([IMAGE] * TOKENS, SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=TOWER,
)
