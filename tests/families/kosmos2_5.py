"""KOSMOS-2.5: Pix2Struct tower on patches that carry their row and column, a resampler to 16 tokens, Magneto decoder.

Special: as in `kosmos2` an image's place is told by `image_embeds_position_mask`, and positions are sinusoids counted
from the token ids, but `generate` is the usual one, and so are masks. Image features have unit length. MHA 4/4. One
image a row.
"""

import dataclasses

import torch
from transformers import Kosmos2_5Config, Kosmos2_5ForConditionalGeneration
from transformers.models.kosmos2_5.configuration_kosmos2_5 import Kosmos2_5TextConfig, Kosmos2_5VisionConfig

from tests.families import kosmos2
from tests.zoo._base import BOS, EOS, PAD, VISION, VOCAB, build

GRID = kosmos2.SIDE // kosmos2.PATCH


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = Kosmos2_5TextConfig(
        vocab_size=VOCAB,
        max_position_embeddings=1024,
        embed_dim=64,
        layers=4,
        ffn_dim=96,
        attention_heads=4,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    vision = Kosmos2_5VisionConfig(
        **VISION, head_dim=16, patch_embed_hidden_size=3 * kosmos2.PATCH**2, max_num_patches=GRID**2
    )
    config = Kosmos2_5Config(
        text_config=text, vision_config=vision, latent_query_num=kosmos2.TOKENS, tie_word_embeddings=False
    )
    return build(Kosmos2_5ForConditionalGeneration, config, attn_implementation, dtype, seed, embed_std=1 / 8)


def inputs(model, batch=1, seed=0, first=0):
    made = kosmos2.inputs(model, batch, seed, first)
    pictures = made.pop("pixel_values")
    patches = torch.nn.functional.unfold(pictures, kosmos2.PATCH, stride=kosmos2.PATCH).transpose(1, 2)
    places = torch.cartesian_prod(*2 * [torch.arange(1, GRID + 1)]).to(patches).expand(len(patches), -1, -1)
    return made | {"flattened_patches": torch.cat([places, patches], dim=-1)}


MODEL = dataclasses.replace(kosmos2.MODEL, name="kosmos-2.5", make=make, inputs=inputs, static_cache=True, notes="")
