"""Qwen2.5-Omni's thinker: the tower and decoder of Qwen2.5-VL, and an audio encoder beside the tower.

Special: behind every image of size "B" stands an audio clip of 6 tokens (not visual: to a plan they are text). The
audio encoder runs conv and attention per chunk of 16 frames. Position ids are four-fold (text, then time, height and
width), computed from images and clips together in Python loops; `rope_deltas` live on the model. Tower layer 0 attends
within windows, layer 1 within the image.
"""

import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import IMAGE, VISION_END, VISION_START, ZooModel, build, dtype_of, image_tokens, pixels, prompt

AUDIO_START, AUDIO, AUDIO_END = 245, 246, 247
MELS, FRAMES, CLIP = 8, 24, 6
"""Of a clip: mel bins, frames, and the tokens that they become."""


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    tower = {
        **_qwen.TOWER,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": _qwen.TEXT["hidden_size"],
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    audio = {
        "num_mel_bins": MELS,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "d_model": 32,
        "max_source_positions": 64,
        "n_window": 8,
        "output_dim": _qwen.TEXT["hidden_size"],
    }
    config = Qwen2_5OmniThinkerConfig(
        text_config=_qwen.TEXT,
        vision_config=tower,
        audio_config=audio,
        image_token_index=IMAGE,
        video_token_index=_qwen.IDS["video_token_id"],
        audio_token_index=AUDIO,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return build(Qwen2_5OmniThinkerForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0, clip_tokens=CLIP):
    def image(size, generator):
        t, h, w = grid = _qwen.GRIDS[size]
        tokens = [VISION_START, *[IMAGE] * (t * h * w // _qwen.MERGE**2), VISION_END]
        patches = pixels(generator, t * h * w, 3 * _qwen.TEMPORAL * _qwen.PATCH**2)
        if size == "A":
            return tokens, (patches, grid, None)
        clip = pixels(generator, 1, MELS, FRAMES)
        return [*tokens, AUDIO_START, *[AUDIO] * clip_tokens, AUDIO_END], (patches, grid, clip)

    made = prompt(image, batch, seed, first)
    out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
    if made.flat_images:
        patches, grids, clips = zip(*made.flat_images, strict=True)
        out |= {"pixel_values": torch.cat(patches).to(dtype_of(model)), "image_grid_thw": torch.tensor(grids)}
        heard = [clip for clip in clips if clip is not None]
        if heard:
            out["input_features"] = torch.cat(heard).to(dtype_of(model))
            out["feature_attention_mask"] = torch.ones(len(heard), FRAMES, dtype=torch.long)
    return out


MODEL = ZooModel(
    name="qwen2_5_omni_thinker",
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
