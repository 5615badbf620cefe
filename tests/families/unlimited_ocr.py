"""Unlimited-OCR: SAM tower, CLIP encoder on its feature map, both side by side an image's tokens, experts.

Special: every decoder layer sees the whole prompt and a window of 4 (of 128) over what was generated: its cache keeps
the prompt apart from the window and joins both on every step. An image is 4 rows of 4 tokens with a learned newline
each and a separator (21 tokens). The decoder is DeepSeek-V2's with plain heads (MHA 4/4); layer 0 is dense, the others
route each token to 2 of 4 experts beside two shared ones.
"""

import torch
from transformers import UnlimitedOcrConfig, UnlimitedOcrForConditionalGeneration

from tests.families import got_ocr2
from tests.zoo._base import DECODER, IMAGE, VISION, ZooModel, build, image_tokens, stacked_inputs

SIDE = got_ocr2.SIDE
GRID = SIDE // got_ocr2.PATCH // 4
TOKENS = GRID * (GRID + 1) + 1

SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": got_ocr2.PATCH,
    "window_size": 6,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "downsample_channels": [24, 32],
}
TEXT = {
    **{**DECODER, "num_key_value_heads": 4},
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = UnlimitedOcrConfig(
        vision_config={"sam_config": SAM, "encoder_config": {**VISION, "image_size": 8, "patch_size": 2}},
        text_config={**TEXT, "sliding_window": 4},
        image_token_id=IMAGE,
    )
    return build(UnlimitedOcrForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="unlimited_ocr",
    make=make,
    inputs=stacked_inputs([IMAGE] * TOKENS, SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("sliding",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=4,
    no_cache=False,
    padding_exact=False,
    notes="Without a cache all tokens count as prompt. Once the window moves, padding is looked up at the wrong keys.",
)
