"""Kimi K2.5: MoonViT tower on packed patches, DeepSeek-V3 decoder: multi-head latent attention and experts.

Special: the cache holds latents, not keys and values: one row of 24 numbers and one rotated key of 8 for all heads a
token, expanded to keys (16 + 8 wide) and values (16 wide) of 4 heads on every step. Keys are written into an empty
tensor in place. Layer 0 is dense, the others route each token to 2 of 8 experts of 2 groups beside a shared one.
Images of any size: 6 tokens for 4 x 6 patches, 16 for 8 x 8.
"""

import torch
from transformers import DeepseekV3Config, Kimi_K25Config, Kimi_K25ForConditionalGeneration, Kimi_K25VisionConfig

from tests.zoo._base import (
    DECODER,
    IMAGE,
    VIDEO,
    VISION,
    VISION_END,
    VISION_START,
    ZooModel,
    build,
    dtype_of,
    image_tokens,
    pixels,
    prompt,
)

PATCH, MERGE = 4, 2
GRIDS = {"A": (1, 4, 6), "B": (1, 8, 8)}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = DeepseekV3Config(
        **{**DECODER, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=24,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_mtp_layers=0,
    )
    config = Kimi_K25Config(
        text_config=text,
        vision_config=Kimi_K25VisionConfig(**VISION, patch_size=PATCH, pos_emb_height=8, pos_emb_width=8),
        projection_hidden_size=VISION["hidden_size"],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return build(Kimi_K25ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        t, h, w = GRIDS[size]
        tokens = [VISION_START, *[IMAGE] * (t * h * w // MERGE**2), VISION_END]
        return tokens, (pixels(generator, t * h * w, 3, PATCH, PATCH), GRIDS[size])

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        patches, grids = zip(*made.flat_images, strict=True)
        out |= {"pixel_values": torch.cat(patches).to(dtype_of(model)), "image_grid_thw": torch.tensor(grids)}
    return out


MODEL = ZooModel(
    name="kimi_k25",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=24,
    vision_sites=2,
    mixed_sizes=True,
)
