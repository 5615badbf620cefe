"""Molmo 2: ViT, attention pooling of 2 x 2 patches into a token, Qwen3-like decoder (normed q and k, GQA 4/2).

Special: all image tokens of a prompt see each other, in both directions and across images (one block for all of them,
from `mm_token_type_ids`), start, end and column tokens included: these count as visual, too. Image features are
*added* to the placeholders' embeddings, under an index that depends on data. An image is a low-resolution view (4
tokens and 2 columns) and crops (6 or 9 tokens). RoPE comes scaled and unscaled, by layer. The embedding table is
larger than the head.
"""

import torch
from transformers import Molmo2Config, Molmo2ForConditionalGeneration
from transformers.models.molmo2 import Molmo2AdapterConfig, Molmo2TextConfig, Molmo2VisionConfig

from tests.zoo._base import (
    DECODER,
    IMAGE,
    ROW_BREAK,
    VIDEO,
    VISION_END,
    VISION_START,
    ZooModel,
    build,
    dtype_of,
    pixels,
    prompt,
)

PATCH, SIDE = 4, 4
"""Pixels of a patch, patches of a crop."""
EXTRA = 8
LOW, CELL = 2, 2
"""Tokens along the low-resolution view; patches along what a token pools."""
HIGH = {"A": (2, 3), "B": (3, 3)}
"""Tokens of the high-resolution view, which two crops of 4 x 4 patches cover."""


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = {key: value for key, value in DECODER.items() if key != "tie_word_embeddings"}
    config = Molmo2Config(
        text_config=Molmo2TextConfig(
            **text,
            head_dim=16,
            additional_vocab_size=EXTRA,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
            rope_scaling_layers=[1, 2],
        ),
        vision_config=Molmo2VisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            image_size=[SIDE * PATCH, SIDE * PATCH],
            patch_size=PATCH,
        ),
        adapter_config=Molmo2AdapterConfig(
            vision_feature_layer=[1, 0],
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=48,
            text_hidden_size=DECODER["hidden_size"],
        ),
        image_patch_id=IMAGE,
        image_start_token_id=VISION_START,
        low_res_image_start_token_id=VIDEO,
        image_end_token_id=VISION_END,
        frame_start_token_id=VISION_START,
        frame_end_token_id=VISION_END,
    )
    return build(Molmo2ForConditionalGeneration, config, attn_implementation, dtype, seed)


def pooling(size):
    """[tokens, 4]: the patches that each token pools, counted from the image's first crop; -1 is none."""
    grid = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    low = grid.unfold(0, CELL, CELL).unfold(1, CELL, CELL).reshape(LOW * LOW, CELL * CELL)
    rows, columns = HIGH[size]
    both = torch.cat([grid + SIDE * SIDE, grid + 2 * SIDE * SIDE], 1)
    both = torch.nn.functional.pad(both, (0, 0, 0, rows * CELL - SIDE), value=-1)[:, : columns * CELL]
    high = both.unfold(0, CELL, CELL).unfold(1, CELL, CELL).reshape(rows * columns, CELL * CELL).clone()
    if rows * CELL > SIDE:
        high[-columns:] = torch.cat([high[:columns, 2:], torch.full((columns, 2), -1)], 1)
    return torch.cat([low, high])


def inputs(model, batch=1, seed=0, first=0):
    def image(size, generator):
        rows, columns = HIGH[size]
        low = [VIDEO, *([IMAGE] * LOW + [ROW_BREAK]) * LOW, VISION_END]
        high = [VISION_START, *([IMAGE] * columns + [ROW_BREAK]) * rows, VISION_END]
        crops = pixels(generator, 3, SIDE * SIDE, 3 * PATCH**2)
        return low + high, (crops, pooling(size), (LOW, LOW, rows, columns))

    made = prompt(image, batch, seed, first)
    types = (made.input_ids >= IMAGE).long()
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask, "mm_token_type_ids": types}
    if made.flat_images:
        crops, pools, grids = zip(*made.flat_images, strict=True)
        moved = [torch.where(pool < 0, pool, pool + 3 * SIDE * SIDE * i) for i, pool in enumerate(pools)]
        out |= {
            "pixel_values": torch.cat(crops).to(dtype_of(model)),
            "image_token_pooling": torch.cat(moved),
            "image_grids": torch.tensor(grids),
            "image_num_crops": torch.tensor([3] * len(crops)),
        }
    return out


MODEL = ZooModel(
    name="molmo2",
    make=make,
    inputs=inputs,
    visual_positions=lambda model, inputs: inputs["mm_token_type_ids"] != 0,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=3,
    mixed_sizes=True,
)
