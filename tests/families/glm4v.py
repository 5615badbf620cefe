"""GLM-4.1V: a tower as Qwen2.5-VL's, decoder layers with four norms each, half of every head rotated (GQA 4/2).

Special: M-RoPE in interleaved pairs on half of a head's dimensions; q, k and v have biases, o has not. A norm behind
attention and MLP, before they are added. Images differ in size (6 and 16 tokens); positions of the tower are sampled
from a grid; packed patches and `rope_deltas` as in Qwen2-VL.
"""

import torch
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import VIDEO, VISION_END, VISION_START, ZooModel, build, image_tokens

TEXT = {
    **_qwen.TEXT,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    },
}
TOWER = {
    **_qwen.TOWER,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": TEXT["hidden_size"],
    "image_size": 32,
}
IDS = {
    "image_token_id": _qwen.IDS["image_token_id"],
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": VISION_START,
    "video_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    config = Glm4vConfig(text_config=TEXT, vision_config=TOWER, **IDS)
    return build(Glm4vForConditionalGeneration, config, attn_implementation, dtype, seed)


MODEL = ZooModel(
    name="glm4v",
    make=make,
    inputs=_qwen.inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=("full",) * 4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
