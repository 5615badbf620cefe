"""DeepSeek-OCR 2: SAM tower, then a causal encoder that reads its patches with learned queries, decoder with experts.

Special: in the encoder patches see each other, queries what stands before them; the 144 queries of small images are an
image's tokens. "A" is one view and a separator (145 tokens), "B" has a smaller view of its own before that (289). The
tower's attention adds relative positions to its logits, in windows and globally. The decoder is DeepSeek-V2's with
plain heads (MHA 4/4); layer 0 is dense, the others route each token to 2 of 4 experts beside two shared ones.
"""

import torch
from transformers import DeepseekOcr2Config, DeepseekOcr2ForConditionalGeneration

from tests.families.unlimited_ocr import SAM, SIDE, TEXT
from tests.zoo._base import IMAGE, VISION, ZooModel, build, dtype_of, image_tokens, pixels, prompt

SMALL = 24
VIEW = 144
TOKENS = {"A": VIEW + 1, "B": 2 * VIEW + 1}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = DeepseekOcr2Config(
        vision_config={"sam_config": SAM, "encoder_config": {**VISION, "num_key_value_heads": 1}},
        text_config=TEXT,
        image_token_id=IMAGE,
    )
    return build(DeepseekOcr2ForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        views = pixels(generator, 1, 3, SIDE, SIDE), pixels(generator, int(size == "B"), 3, SMALL, SMALL)
        return [IMAGE] * TOKENS[size], views

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        whole, small = zip(*made.flat_images, strict=True)
        out["pixel_values"] = torch.cat(whole).to(dtype_of(model))
        if any(map(len, small)):
            out["pixel_values_local"] = torch.cat(small).to(dtype_of(model))
            out["num_local_patches"] = torch.tensor([len(views) for views in small])
    return out


MODEL = ZooModel(
    name="deepseek_ocr2",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vision_sites=4,
    mixed_sizes=True,
)
