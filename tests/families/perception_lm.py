"""PerceptionLM: Perception Encoder without its CLS token, pooled by two, Llama decoder with GQA 4/2.

Special: two kinds of visual token in one prompt. An image is two tiles of 9 tokens, a video three frames of 9; each has
its placeholder and input, and one tower sees both. "A" is an image, "B" a video. The real tower is one of timm's, which
this project does not need: a CLIP tower stands in for it.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, PerceptionLMConfig, PerceptionLMForConditionalGeneration

from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION, ZooModel, build, dtype_of, pixels, prompt

SIDE, PATCH, POOL = 24, 4, 2
TOKENS = (SIDE // PATCH // POOL) ** 2
TILES, FRAMES = 2, 3


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    tower = CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=32)
    tower.model_args = {"embed_dim": VISION["hidden_size"]}  # where timm's have it
    config = PerceptionLMConfig(
        vision_config=tower,
        text_config=LlamaConfig(**DECODER),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=POOL,
    )
    return build(PerceptionLMForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        token, parts = (IMAGE, TILES) if size == "A" else (VIDEO, FRAMES)
        return [token] * (TOKENS * parts), pixels(generator, parts, 3, SIDE, SIDE)

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    for name, parts in (("pixel_values", TILES), ("pixel_values_videos", FRAMES)):
        found = [picture for picture in made.flat_images if len(picture) == parts]
        if found:
            out[name] = torch.stack(found).to(dtype_of(model))
    return out


def visual_positions(model, inputs):
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


MODEL = ZooModel(
    name="perception_lm",
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
