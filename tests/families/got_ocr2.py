"""GOT-OCR 2: SAM tower with windowed and global layers and decomposed relative positions, Qwen2 decoder (MHA 4/4).

Special: the tower's attention is written out (a softmax over logits to which relative positions are added), never
SDPA; two strided convolutions lead from its 16 x 16 patches to 16 tokens. transformers forbids SDPA for the model as a
whole, the tower included, and lets the decoder have it: `attn_implementation="sdpa"` is given to the decoder's part
alone.
"""

import torch
from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, GotOcr2VisionConfig, Qwen2Config

from tests.zoo._base import (
    DECODER,
    IMAGE,
    VISION_END,
    VISION_START,
    ZooModel,
    build,
    image_tokens,
    stacked_inputs,
)

SIDE, PATCH = 32, 2
TOKENS = (SIDE // PATCH // 4) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = GotOcr2Config(
        text_config=Qwen2Config(**{**DECODER, "num_key_value_heads": 4}),
        vision_config=GotOcr2VisionConfig(
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            window_size=6,
            global_attn_indexes=[1],
            mlp_dim=48,
        ),
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    parts = {"": "eager", "vision_config": "eager", "text_config": attn_implementation}
    return build(GotOcr2ForConditionalGeneration, config, parts, dtype, seed)


MODEL = ZooModel(
    name="got_ocr2",
    make=make,
    inputs=stacked_inputs([VISION_START, *[IMAGE] * TOKENS, VISION_END], SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=2,
)
