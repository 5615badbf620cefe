"""dots3.note: tower on packed patches with experts, decoder of multi-head latent attention, indexed and sliding layers.

Special: an indexed layer attends only to the 16 keys that score highest for its query under a small attention of its
own (DeepSeek sparse attention, with its own cached keys); what the others hold is masked. Sliding layers have half of
the heads, latents and a base of rotation of their own. Latents are scaled, the shared rotated key is normed, each
head's output has a gate. Layers behind the first route tokens to 2 of 8 experts beside a shared one, and so does the
tower's last. Images of any size: 6 and 16 tokens. The audio tower exists and is not run.
"""

import torch
from transformers import Dots3NoteConfig, Dots3NoteForConditionalGeneration

from tests.zoo import _qwen
from tests.zoo._base import DECODER, IMAGE, VIDEO, VISION, VOCAB, ZooModel, build, image_tokens

KINDS = ("full", "full", "sliding", "sliding", "sliding", "full")
LAYERS = {"full": "indexed_attention", "sliding": "sliding_attention"}


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = {
        **{**DECODER, "num_hidden_layers": len(KINDS), "num_key_value_heads": 4},
        "layer_types": [LAYERS[kind] for kind in KINDS],
        "q_lora_rank": 32,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "head_dim": 24,
        "v_head_dim": 16,
        "index_topk": 16,
        "index_head_dim": 16,
        "index_n_heads": 16,
        "sliding_window": 8,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_qk_nope_head_dim": 12,
        "swa_head_dim": 20,
        "swa_v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_experts_intermediate_size": 32,
    }
    vision = {
        **VISION,
        "patch_size": _qwen.PATCH,
        "pyramid_num_routed": [-1, 4],
        "moe_intermediate_size": 24,
        "adapter_in_dim": VISION["hidden_size"],
        "adapter_out_dim": DECODER["hidden_size"],
    }
    audio = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "feature_size": 8,
        "downsample_hidden_size": 4,
        "adapter_input_size": 16,
        "adapter_out_dim": DECODER["hidden_size"],
    }
    config = Dots3NoteConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=VOCAB - 1,
    )
    return build(Dots3NoteForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(model, batch=1, seed=0, first=0):
    made = _qwen.inputs(model, batch, seed, first, frames=1)
    del made["mm_token_type_ids"]
    return made


MODEL = ZooModel(
    name="dots3_note",
    make=make,
    inputs=inputs,
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=4,
    head_dim=24,
    vision_sites=2,
    mixed_sizes=True,
)
