"""InstructBLIP: ViT, Q-Former that reads the question beside an image and gives 16 tokens, Llama decoder (MHA 4/4).

Special: as `blip2`: `generate` is the model's own and calls that of the *language model*, so a compiled `forward` of
the whole is never called. The Q-Former's 16 queries and the question's tokens attend to each other, queries alone to
the image. One row may hold several images, each read with the row's last words.
"""

import dataclasses

import torch
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
)

from tests.families import blip2
from tests.zoo._base import DECODER, IMAGE, VISION, VOCAB, build, stacked_inputs

WORDS = 4


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = InstructBlipConfig(
        text_config=LlamaConfig(**{**DECODER, "num_key_value_heads": 4}),
        qformer_config=InstructBlipQFormerConfig(**VISION, vocab_size=VOCAB, cross_attention_frequency=2),
        vision_config=InstructBlipVisionConfig(**VISION, image_size=blip2.SIDE, patch_size=blip2.PATCH),
        num_query_tokens=blip2.TOKENS,
        image_token_index=IMAGE,
    )
    return build(InstructBlipForConditionalGeneration, config, attn_implementation, dtype, seed)


def question(made):
    """The same for each image of a row."""
    images = torch.tensor([len(row) for row in made.images])
    return {"qformer_input_ids": made.input_ids[:, -WORDS:].repeat_interleave(images, 0)}


MODEL = dataclasses.replace(
    blip2.MODEL,
    name="instructblip",
    make=make,
    inputs=stacked_inputs([IMAGE] * blip2.TOKENS, blip2.SIDE, extra=question),
    decoder_prefix="language_model.model.layers",
)
