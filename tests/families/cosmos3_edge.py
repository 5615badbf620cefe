"""Cosmos 3 Edge: SigLIP 2 tower on packed patches of any size, a decoder with GQA 4/2 and an MLP without a gate.

Special: interleaved M-RoPE, written into the angles of time in place. Learned positions of the tower are resampled for
each image. Patches have no time: a video is so many frames.
"""

import dataclasses
import functools

import torch
from transformers import Cosmos3EdgeConfig, Cosmos3EdgeForConditionalGeneration

from tests.zoo import _qwen, qwen2_vl
from tests.zoo._base import VISION, build

TEXT = {**_qwen.TEXT, "head_dim": 16}
TOWER = {**VISION, "patch_size": _qwen.PATCH, "num_patches": 16, "spatial_merge_size": _qwen.MERGE}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Cosmos3EdgeConfig(text_config=TEXT, vision_config=TOWER, projector_hidden_size=48, **_qwen.IDS)
    return build(Cosmos3EdgeForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = dataclasses.replace(
    qwen2_vl.MODEL, name="cosmos3_edge", make=make, inputs=functools.partial(_qwen.inputs, frames=1)
)
