"""Ovis2: a tower that says of every patch which visual words it is, a table of visual words, Qwen2 decoder, GQA 4/2.

Special: an image's embedding is a mixture of the rows of a table, weighted by a softmax over the visual vocabulary.
Five indicator tokens around and between the tiles take their embeddings from that table, too, written in by index where
there is one (`if mask.any()`): whether a prompt has them is asked of the data. They say nothing of the pixels and count
as text. An image is one tile of 9 tokens, or the whole picture and two tiles.
"""

import torch
from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Qwen2Config
from transformers.models.ovis2 import Ovis2VisionConfig

from tests.zoo._base import DECODER, IMAGE, VISION, VOCAB, ZooModel, build, image_tokens, stacked_inputs

SIDE, PATCH, STRIDE = 24, 4, 2
INDICATORS = START, GRID, COLUMN, ROW, END = 240, 241, 242, 243, 244
ATOMS = [IMAGE] * (SIDE // PATCH // STRIDE) ** 2


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Ovis2Config(
        vision_config=Ovis2VisionConfig(
            **VISION, image_size=SIDE, patch_size=PATCH, hidden_stride=STRIDE, vocab_size=64 + len(INDICATORS)
        ),
        text_config=Qwen2Config(**DECODER),
        image_token_id=IMAGE,
        visual_indicator_token_ids=list(INDICATORS),
        vocab_size=VOCAB,
        hidden_size=DECODER["hidden_size"],
        tie_word_embeddings=False,
    )
    model = build(Ovis2ForConditionalGeneration, config, attn_implementation, dtype, seed)
    model.model.vision_tower.head_norm.weight.mul_(3)  # visual words that are sure of themselves,
    model.model.visual_embeddings_table.weight.mul_(DECODER["hidden_size"] ** 0.5)  # and as large as textual ones
    return model


MODEL = ZooModel(
    name="ovis2",
    make=make,
    inputs=stacked_inputs(
        {
            "A": [START, *ATOMS, GRID, END],
            "B": [START, *ATOMS, GRID, *ATOMS, COLUMN, *ATOMS, END],
        },
        SIDE,
        tiles={"A": 1, "B": 3},
    ),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
