"""Gemma 3n: a convolutional tower, sliding and full decoder layers, the last of which keep no keys of their own.

Special: the last two layers (one of each kind) attend to the keys and values of the last layer of their kind before
them (`num_kv_shared_layers`): no k_proj, no v_proj, no entry in the cache. The scale is 1, as q, k and v are normed.
The hidden state is four streams (AltUp), of which one is attended from; every layer adds an embedding of its own of the
token (per-layer inputs). The ids of special tokens lie in embedding tables of their own behind the text's. Image tokens
attend causally. Logits are capped. The real tower is timm's MobileNetV5, here two convolutions; the audio tower exists
and is not run.
"""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    AutoModel,
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
    PreTrainedModel,
)

from tests.zoo._base import (
    DECODER,
    IMAGE,
    VISION_END,
    VISION_START,
    VOCAB,
    ZooModel,
    build,
    image_tokens,
    stacked_inputs,
)

SIDE = 32
TOKENS = (SIDE // 8) ** 2
KINDS = ("sliding", "full", "sliding", "full", "sliding", "full")
SHARED = 2
AUDIO = 254  # first id of the audio vocabulary; that of images is [IMAGE, AUDIO)


class TowerConfig(Gemma3nVisionConfig):
    model_type = "tower_in_place_of_timm"


class Tower(PreTrainedModel):
    """[images, 3, SIDE, SIDE] -> [images, channels, SIDE / 8, SIDE / 8]."""

    config_class = TowerConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.down = nn.Conv2d(3, 16, 4, stride=4)
        self.up = nn.Conv2d(16, config.hidden_size, 2, stride=2)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        return SimpleNamespace(last_hidden_state=self.up(nn.functional.gelu(self.down(pixel_values))))


AutoModel.register(TowerConfig, Tower, exist_ok=True)


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0):
    text = Gemma3nTextConfig(
        **{**DECODER, "num_hidden_layers": len(KINDS)},
        head_dim=16,
        sliding_window=8,
        layer_types=[f"{kind}_attention" for kind in KINDS],
        num_kv_shared_layers=SHARED,
        vocab_size_per_layer_input=IMAGE,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.95] * 2 + [0.0] * (len(KINDS) - 2),
    )
    vision = TowerConfig(hidden_size=32, vocab_offset=IMAGE, vocab_size=AUDIO - IMAGE)
    audio = Gemma3nAudioConfig(
        vocab_size=VOCAB - AUDIO,
        vocab_offset=AUDIO,
        input_feat_size=16,
        hidden_size=16,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=1,
        sscp_conv_channel_size=[4, 4],
    )
    config = Gemma3nConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        vision_soft_tokens_per_image=TOKENS,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
        image_token_id=IMAGE,
        boa_token_id=AUDIO,
        eoa_token_id=AUDIO,
        audio_token_id=AUDIO + 1,
        tie_word_embeddings=False,
    )
    return build(Gemma3nForConditionalGeneration, config, attn_implementation, dtype, seed, embed_std=1 / 8)


MODEL = ZooModel(
    name="gemma3n",
    make=make,
    inputs=stacked_inputs([VISION_START, *[IMAGE] * TOKENS, VISION_END], SIDE),
    visual_positions=image_tokens,
    decoder_prefix="model.language_model.layers",
    attention_kinds=KINDS,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vision_sites=0,
    shares={4: 2, 5: 3},
)
