"""Llama 3.2 Vision: image features are not in the sequence but in cross-attention layers between self-attention ones.

Special: layers are full, cross, full, full, cross, full; no visual positions at all. Images are one or two tiles of 5
tokens; a token sees only the last image before it (`cross_attention_mask`); rows are padded to three images. The tower
is two local layers and a gated global one over all tiles of an image. Tokens before the first image attend to *every*
image key, padding included (transformers masks only their MLP): hence a fixed number of images, even for a row without.
"""

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama import MllamaTextConfig, MllamaVisionConfig

from tests.zoo._base import DECODER, IMAGE, ZooModel, build, dtype_of, pixels, prompt

SIDE, PATCH, IMAGES = 16, 8, 3
ASPECTS = [[1, 1], [1, 2]]  # tiles; an image's aspect id counts from 1
TILES = {"A": 1, "B": 2}
KINDS = ("full", "cross", "full", "full", "cross", "full")


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    vision = MllamaVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        max_num_tiles=2,
        supported_aspect_ratios=ASPECTS,
        intermediate_layers_indices=[0],
        vision_output_dim=64,
    )
    text = {key: value for key, value in DECODER.items() if key != "num_hidden_layers"}
    text = MllamaTextConfig(
        **text,
        num_hidden_layers=len(KINDS),
        cross_attention_layers=[i for i, kind in enumerate(KINDS) if kind == "cross"],
    )
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return build(MllamaForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        return [IMAGE], pixels(generator, TILES[size], 3, SIDE, SIDE)

    made = prompt(image, batch, seed, first)
    values = torch.zeros(batch, IMAGES, 2, 3, SIDE, SIDE)
    aspect_ids = torch.zeros(batch, IMAGES, dtype=torch.long)
    tile_mask = torch.zeros(batch, IMAGES, 2, dtype=torch.long)
    tile_mask[:, :, 0] = 1  # as the processor does: a padding image keeps one tile, lest its rows be all masked
    seen = torch.zeros(*made.input_ids.shape, IMAGES, 2, dtype=torch.long)
    last_image = (made.input_ids == IMAGE).cumsum(-1) - 1  # -1 before the first
    for row, images in enumerate(made.images):
        for i, tiles in enumerate(images):
            values[row, i, : len(tiles)] = tiles
            aspect_ids[row, i] = len(tiles)
            tile_mask[row, i, : len(tiles)] = 1
            seen[row, last_image[row] == i, i, : len(tiles)] = 1
    return {
        "input_ids": made.input_ids,
        "attention_mask": made.attention_mask,
        "pixel_values": values.to(dtype_of(model)),
        "aspect_ratio_ids": aspect_ids,
        "aspect_ratio_mask": tile_mask,
        "cross_attention_mask": seen,
    }


MODEL = ZooModel(
    name="mllama",
    make=make,
    inputs=inputs,
    visual_positions=lambda model, inputs: torch.zeros_like(inputs["input_ids"], dtype=torch.bool),
    decoder_prefix="model.language_model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=3,
    static_cache="_prepare_static_cache" in vars(MllamaForConditionalGeneration),
    notes="Older transformers size the static cache of cross-attention layers by the text.",
    mixed_sizes=True,
)
