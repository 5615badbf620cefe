"""VideoLLaMA 3: SigLIP tower with 2-D rotary embedding over packed patches, Qwen2 decoder with GQA 4/2.

Special: images of any size are packed into one row of patches, with one attention call an image. How many patches make
a token is a number per image (`image_merge_sizes`, 1 or 2), by bilinear interpolation behind the tower. 16 tokens for
4 x 4 patches unmerged, 12 for 6 x 8 merged by 2. Positions of the decoder are plain, unlike Qwen2-VL's.
"""

import torch
from transformers import Qwen2Config, VideoLlama3Config, VideoLlama3ForConditionalGeneration, VideoLlama3VisionConfig

from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION, ZooModel, build, dtype_of, image_tokens, pixels, prompt

PATCH = 4
GRIDS = {"A": (1, 4, 4), "B": (1, 6, 8)}
MERGES = {"A": 1, "B": 2}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = VideoLlama3Config(
        text_config=Qwen2Config(**DECODER),
        vision_config=VideoLlama3VisionConfig(**VISION, patch_size=PATCH),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return build(VideoLlama3ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        t, h, w = GRIDS[size]
        patches = pixels(generator, t * h * w, 3 * PATCH**2)
        return [IMAGE] * (t * h * w // MERGES[size] ** 2), (patches, GRIDS[size], MERGES[size])

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        patches, grids, merges = zip(*made.flat_images, strict=True)
        out |= {
            "pixel_values": torch.cat(patches).to(dtype_of(model)),
            "image_grid_thw": torch.tensor(grids),
            "image_merge_sizes": torch.tensor(merges),
        }
    return out


MODEL = ZooModel(
    name="video_llama_3",
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
