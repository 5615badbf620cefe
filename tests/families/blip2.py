"""BLIP-2: ViT, Q-Former that turns an image into 16 query tokens, OPT decoder (MHA 4/4).

Special: `generate` is the model's own: it runs tower and Q-Former itself, splices, and calls `generate` of the
*language model* with embeddings, so a compiled `forward` of the whole is never called. OPT has learned positions,
counted from the attention mask, a bias everywhere and scales queries before attention. One row may hold several images
of 16 tokens each.
"""

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

from tests.zoo._base import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    VISION,
    VOCAB,
    ZooModel,
    build,
    image_tokens,
    stacked_inputs,
)

SIDE, PATCH, TOKENS = 16, 4, 16


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    queries = Blip2QFormerConfig(**VISION, vocab_size=32, cross_attention_frequency=2)
    config = Blip2Config(
        text_config=text,
        qformer_config=queries,
        vision_config=Blip2VisionConfig(**VISION, image_size=SIDE, patch_size=PATCH),
        num_query_tokens=TOKENS,
        image_text_hidden_size=32,
        image_token_index=IMAGE,
    )
    return build(Blip2ForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="blip-2",
    make=make,
    inputs=stacked_inputs([IMAGE] * TOKENS, SIDE),
    visual_positions=image_tokens,
    decoder_prefix="language_model.model.decoder.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=2,
    no_cache=False,
    notes="`generate` wants an image. Given embeddings, it turns `use_cache` on again.",
)
