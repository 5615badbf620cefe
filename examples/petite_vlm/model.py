"""Assemble the model: stock `LlavaForConditionalGeneration` from the converted parts, adapter merged in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Dinov2Config,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from avl_fx import Plan

from .convert import IMAGE_TOKEN, WEIGHTS, language_dir, name_in_older_release, vision_dir
from .lora import merge_lora
from .parts import ChecksumError, PartsError, sha256_of
from .processor import PetiteProcessor

ADAPTER = Path(__file__).parent / "adapter" / "petite_vlm.safetensors"
MIXTURE = ADAPTER.with_name("mixture.safetensors")
"""Trained on all data sets; the other one knows easy-VQA alone."""
READER = ADAPTER.with_name("reader.safetensors")
"""`MIXTURE`, trained on with five times as many pictures: it reads half of the words."""
LAZY = ADAPTER.with_name("lazy_35.safetensors")
"""`MIXTURE`, trained on under three lazy plans that save 35% of the KV bytes."""
TRAINED_AT = 168  # pixels
FEATURE_LAYERS = (-3,)  # the last two layers of this ViT were tuned for saliency maps


def build_config(
    text: LlamaConfig, vision: Dinov2Config, image_token_id: int, feature_layers: Sequence[int] = FEATURE_LAYERS
) -> LlavaConfig:
    """The LLaVA configuration over the two parts; the projector is given these layers' features, side by side."""
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_id,
        vision_feature_layer=feature_layers[0] if len(feature_layers) == 1 else list(feature_layers),
        vision_feature_select_strategy="default",
        image_seq_length=144,
        tie_word_embeddings=True,
    )


def _random_projector(config: LlavaConfig) -> dict[str, torch.Tensor]:
    """Weights of an untrained projector, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    out = config.text_config.hidden_size
    weights: dict[str, torch.Tensor] = {}
    for name, columns in (("linear_1", width), ("linear_2", out)):
        key = f"model.multi_modal_projector.{name}"
        weights[f"{key}.weight"] = torch.randn(out, columns, generator=generator) * columns**-0.5
        weights[f"{key}.bias"] = torch.zeros(out)
    return weights


def read_adapter(path: Path) -> tuple[dict[str, torch.Tensor], float]:
    """Tensors and LoRA scale of an adapter file; checked against the sha256 in the json beside it, if there is one."""
    described = path.with_suffix(".json")
    if described.exists():
        expected = json.loads(described.read_text())["sha256"]
        if (found := sha256_of(path)) != expected:
            raise ChecksumError(
                f"{path.name} does not belong to {described.name}: sha256 is {found}, expected {expected}. "
                "Restore both files from the same commit."
            )
    with safe_open(path, "pt") as file:
        scale = float(file.metadata()["lora_scale"])
        return {key: file.get_tensor(key) for key in file.keys()}, scale  # noqa: SIM118 (not a mapping)


def recipe_of(path: Path) -> dict[str, Any]:
    """How an adapter was trained, as its file says."""
    with safe_open(path, "pt") as file:
        recipe: dict[str, Any] = json.loads(file.metadata()["recipe"])
    return recipe


def trained_at(path: Path) -> tuple[int, tuple[int, ...]]:
    """Pixels of the pictures that an adapter was trained on, and what of the encoder it saw; the first did not say."""
    recipe = recipe_of(path)
    return int(recipe.get("image_size", TRAINED_AT)), tuple(recipe.get("feature_layers", FEATURE_LAYERS))


def trained_under(path: Path) -> list[Plan]:
    """The plans that an adapter was trained under; each once, where steps took turns."""
    return [Plan.from_json(text) for text in dict.fromkeys(recipe_of(path).get("plans", ()))]


def named_as_here(config: LlavaConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights by the names that this release of transformers has for them.

    Raises:
        PartsError: some weight has no place, or none is there for some place; `from_pretrained` would go on with
            random values.
    """
    with torch.device("meta"):
        expected = LlavaForConditionalGeneration(config).state_dict().keys()
    tower = "model.vision_tower."
    weights = {
        name_in_older_release(name) if name.startswith(tower) and name not in expected else name: value
        for name, value in weights.items()
    }
    if wrong := sorted(weights.keys() ^ expected):
        raise PartsError(
            f"transformers {transformers.__version__} names {len(wrong)} weights otherwise, for example {wrong[0]}. "
            "Install the release that constraints.txt names."
        )
    return weights


def load_petite_vlm(
    adapter: str | Path | None = ADAPTER,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    image_size: int | None = None,
    feature_layers: Sequence[int] | None = None,
) -> tuple[LlavaForConditionalGeneration, PetiteProcessor]:
    """The trained model, in eval mode on the CPU, and its processor.

    `adapter=None` gives the untrained assembly (random projector). `image_size` is a multiple of 14, by default what
    the adapter was trained at: 168 pixels are 144 image tokens, 224 are 256. `feature_layers` are those of the vision
    encoder that the projector is given, by default what the adapter was trained with.
    """
    size, layers = (TRAINED_AT, FEATURE_LAYERS) if adapter is None else trained_at(Path(adapter))
    image_size, feature_layers = image_size or size, feature_layers or layers
    language, vision = language_dir(), vision_dir()
    tokenizer = AutoTokenizer.from_pretrained(language)
    config = build_config(
        LlamaConfig.from_pretrained(language),
        Dinov2Config.from_pretrained(vision),
        tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        feature_layers,
    )
    config.image_seq_length = (image_size // config.vision_config.patch_size) ** 2
    weights = {f"model.language_model.{k}": v for k, v in load_file(language / WEIGHTS).items()}
    weights |= {f"model.vision_tower.{k}": v for k, v in load_file(vision / WEIGHTS).items()}
    if adapter is not None:
        tensors, scale = read_adapter(Path(adapter))
        merge_lora(weights, tensors, scale, prefix="model.language_model.")
        for key, value in tensors.items():
            if key.startswith("projector."):
                weights[f"model.multi_modal_projector.{key.removeprefix('projector.')}"] = value
    else:
        weights |= _random_projector(config)
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    weights = named_as_here(config, weights)
    model = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, attn_implementation=attn_implementation
    )
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval(), PetiteProcessor(tokenizer, image_size=image_size, patch_size=config.vision_config.patch_size)
