"""Nemotron 3 Omni: RADIO tower on packed patches of any size, a decoder of Mamba-2, expert, attention and MLP layers.

Special: a decoder layer is one thing, a mixer without a feed-forward part behind it: most have no attention at all, and
those that have rotate nothing (NoPE, GQA 4/2). Mamba layers keep a convolution's window and a recurrent state. Ten
learned tokens stand before each image's patches in the tower and are dropped behind it; a pixel shuffle merges patches
two by two (6 and 16 tokens). The audio tower exists and is not run.
"""

import torch
from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

from tests.zoo import _qwen
from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION, VOCAB, ZooModel, build, image_tokens

LAYERS = ("linear_attention", "full_attention", "moe", "linear_attention", "full_attention", "mlp", "full_attention")
KINDS = tuple("full" if layer == "full_attention" else "none" for layer in LAYERS)


class WithHead(NemotronH_Omni_Reasoning_V3):
    """The model as it is; its own accessor does not look inside the language model."""

    def get_output_embeddings(self):
        return self.language_model.lm_head


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = {
        **{key: value for key, value in DECODER.items() if key != "num_hidden_layers"},
        "model_type": "nemotron_h",
        "layers_block_type": list(LAYERS),
        "head_dim": 16,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    }
    vision = {
        "model_type": "radio",
        **{key: value for key, value in VISION.items() if key != "intermediate_size"},
        "mlp_ratio": 1.5,
        "patch_size": _qwen.PATCH,
        "max_img_size": 8 * _qwen.PATCH,
        "video_temporal_patch_size": _qwen.TEMPORAL,
    }
    audio = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "subsampling_conv_channels": 4,
        "projection_hidden_size": 16,
        "projection_bias": False,
    }
    config = NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        projector_hidden_size=48,
        vision_hidden_size=VISION["hidden_size"],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=VOCAB - 1,
        tie_word_embeddings=False,
    )
    return build(WithHead, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    made = _qwen.inputs(model, batch, seed, first, frames=1)
    del made["mm_token_type_ids"]
    if "image_grid_thw" in made:
        made["image_grid_hw"] = made.pop("image_grid_thw")[:, 1:]
    return made


MODEL = ZooModel(
    name="nemotron_h_omni",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="language_model.model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=2,
    mixed_sizes=True,
)
