"""LLaVA-OneVision: SigLIP tower, Qwen2 decoder (biased q/k/v), any-resolution tiles.

Special: an image is a base tile (4 tokens) plus a grid of tiles with a learned newline after every row of patches, so
sizes differ: 4 + 2 x (4+1) = 14 tokens for two tiles, 4 + 4 x (4+1) = 24 for four. `pixel_values` is 5-D, padded to the
largest number of tiles.
"""

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION, ZooModel, build, dtype_of, image_tokens, pixels, prompt

SIDE, PATCH = 12, 6
SIZES = {"A": (12, 24), "B": (24, 24)}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=Qwen2Config(**DECODER),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[list(size) for size in SIZES.values()],
    )
    return build(LlavaOnevisionForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        height, width = SIZES[size]
        rows, columns = height // PATCH, width // PATCH
        tiles = 1 + (height // SIDE) * (width // SIDE)
        tokens = [IMAGE] * ((SIDE // PATCH) ** 2 + rows * (columns + 1))
        return tokens, (pixels(generator, tiles, 3, SIDE, SIDE), SIZES[size])

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        tiles, sizes = zip(*made.flat_images, strict=True)
        padded = torch.nn.utils.rnn.pad_sequence(list(tiles), batch_first=True)
        out |= {"pixel_values": padded.to(dtype_of(model)), "image_sizes": torch.tensor(sizes)}
    return out


MODEL = ZooModel(
    name="llava_onevision",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
