"""LLaVA-NeXT-Video: as LLaVA-NeXT, and videos, whose frames are pooled.

Special: two kinds of visual token in one prompt. An image is any-resolution tiles with newlines (14 tokens); a video is
16 frames of 2 x 2 patches, pooled to one token each. The two have placeholders and inputs of their own, and each is
spliced in by its own `masked_scatter`. "A" is an image, "B" a video.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION, ZooModel, build, dtype_of, pixels, prompt

SIDE, PATCH, FRAMES, TILES = 12, 6, 16, 3
SIZE = (12, 24)
TOKENS = 4 + 2 * (4 + 1)


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(**DECODER),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=(SIDE // PATCH) ** 2,
        video_seq_length=FRAMES,
        image_grid_pinpoints=[list(SIZE), [24, 24]],
    )
    return build(LlavaNextVideoForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        if size == "A":
            return [IMAGE] * TOKENS, pixels(generator, TILES, 3, SIDE, SIDE)
        return [VIDEO] * FRAMES, pixels(generator, FRAMES, 3, SIDE, SIDE)

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    images = [tiles for tiles in made.flat_images if len(tiles) == TILES]
    videos = [frames for frames in made.flat_images if len(frames) == FRAMES]
    if images:
        out["pixel_values"] = torch.stack(images).to(dtype_of(model))
        out["image_sizes"] = torch.tensor([SIZE] * len(images))
    if videos:
        out["pixel_values_videos"] = torch.stack(videos).to(dtype_of(model))
    return out


def visual_positions(model, inputs):
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


MODEL = ZooModel(
    name="llava_next_video",
    make=make,
    inputs=inputs,
    visual_positions=visual_positions,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
