"""Inkling: patches folded into tokens without attention, decoder of sliding layers and full ones (GQA 4/1 and 4/2).

Special: no rotation: what a token adds to its logits by distance is learned and made from its own hidden state, as far
as 16 tokens back (8 in sliding layers), and reaches SDPA as an additive mask. Each layer has four short convolutions:
behind keys, values, attention and MLP; the cache keeps their windows, and padding is hidden from them. Queries and keys
are normed, so the scale is 1 / head_dim. Layers behind the first route each token to 2 of 4 experts; two shared
experts' weights are routed along. A patch is a token; embeddings are normed. The audio tower exists and is not run.
"""

import torch
from transformers import InklingConfig, InklingForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import (
    DECODER,
    IMAGE,
    VISION_START,
    VOCAB,
    ZooModel,
    build,
    dtype_of,
    image_tokens,
    pixels,
    prompt,
)

TOKENS = {"A": 6, "B": 16}
KINDS = ("sliding", "full", "sliding", "sliding", "full")
LAYERS = {"sliding": "hybrid_sliding", "full": "hybrid"}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = {
        **{**DECODER, "num_hidden_layers": len(KINDS), "num_key_value_heads": 1},
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "layer_types": [LAYERS[kind] for kind in KINDS],
        "sliding_window_size": 8,
        "rel_extent": 16,
        "d_rel": 8,
        "mlp_layer_types": ["dense", *["sparse"] * (len(KINDS) - 1)],
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "route_scale": 2.0,
        "logits_mup_width_multiplier": 2.0,
    }
    config = InklingConfig(
        text_config=text,
        vision_config={"patch_size": _qwen.PATCH, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
        audio_config={"n_mel_bins": 8, "mel_vocab_size": 8},
        image_token_id=IMAGE,
        image_bos_token_id=VISION_START,
        audio_token_id=VOCAB - 1,
        audio_bos_token_id=VOCAB - 2,
    )
    return build(InklingForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        patches = pixels(generator, TOKENS[size], _qwen.TEMPORAL, _qwen.PATCH, _qwen.PATCH, 3)
        return [VISION_START, *[IMAGE] * TOKENS[size]], patches

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        out["pixel_values"] = torch.cat(made.flat_images).to(dtype_of(model))
    return out


MODEL = ZooModel(
    name="inkling",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=1,
    head_dim=16,
    vision_sites=0,
    static_cache=False,
    mixed_sizes=True,
    notes="With a static cache, what is learned by distance is made for another number of keys than the mask is.",
)
