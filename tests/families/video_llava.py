"""Video-LLaVA: two CLIP towers, one for images and one for videos, Vicuna decoder (MHA 4/4).

Special: two kinds of visual token in one prompt. An image is 16 tokens, without its CLS token; a video is 2 frames of
17, each with it. "A" is an image, "B" a video.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION, ZooModel, build, dtype_of, pixels, prompt

SIDE, PATCH, FRAMES = 24, 6, 2
PATCHES = (SIDE // PATCH) ** 2
VIDEO_TOKENS = FRAMES * (PATCHES + 1)


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(**{**DECODER, "num_key_value_heads": 4}),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=PATCHES,
        video_seq_length=VIDEO_TOKENS,
    )
    return build(VideoLlavaForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        if size == "A":
            return [IMAGE] * PATCHES, pixels(generator, 1, 3, SIDE, SIDE)
        return [VIDEO] * VIDEO_TOKENS, pixels(generator, FRAMES, 3, SIDE, SIDE)

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    images = [frames for frames in made.flat_images if len(frames) == 1]
    videos = [frames for frames in made.flat_images if len(frames) == FRAMES]
    if images:
        out["pixel_values"] = torch.cat(images).to(dtype_of(model))
    if videos:
        out["pixel_values_videos"] = torch.stack(videos).to(dtype_of(model))
    return out


def visual_positions(model, inputs):
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


MODEL = ZooModel(
    name="video_llava",
    make=make,
    inputs=inputs,
    visual_positions=visual_positions,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=4,
    mixed_sizes=True,
)
