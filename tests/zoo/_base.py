"""What a zoo model is, and what all of them share: prompts, weights, token ids.

Prompts. Row `r` of a batch has a fixed content for a given seed, whatever the batch around it: row 0 holds two images
with text before, between and after; row 1 holds three and is longer, so row 0 is left-padded from batch 2 on; row 2
holds one; row 3 none. (Models that are not `ragged` hold two images in every row.) Rows repeat from 4 on, with other
contents. `inputs(model, batch=1, first=2)` gives row 2 alone.

Weights. Every matrix is drawn from one seeded generator with a variance that keeps activations near 1, queries and keys
somewhat larger so that attention is peaked, and vectors (norms, biases, gates) are jittered. Layers therefore differ,
and a wrong attention moves the logits by far more than rounding does. Special tokens have logit 0, so greedy decoding
never emits one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 256
PAD, BOS, EOS = 0, 1, 2
FIRST_TEXT, LAST_TEXT = 10, 239  # ids that text is drawn from, and that greedy decoding can emit
IMAGE, VIDEO, VISION_START, VISION_END, ROW_BREAK = 250, 251, 252, 253, 254

# Keyword arguments that most decoder, and most vision, configs take.
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo. Flags say what the *stock* model can do, so that tests ask only for that."""

    name: str
    make: Callable[..., nn.Module]
    """make(attn_implementation="sdpa", dtype=torch.float32, seed=0) -> a model in eval mode, deterministic."""
    inputs: Callable[..., dict[str, Tensor]]
    """inputs(model, batch=1, seed=0, first=0) -> keyword arguments for model(...) and model.generate(...)."""
    visual_positions: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    """visual_positions(model, inputs) -> bool [batch, seq]: which prompt positions hold image tokens."""
    decoder_prefix: str
    """Where the decoder layers live: `model.get_submodule(decoder_prefix)[i]`."""
    attention_kinds: tuple[str, ...]
    """Per decoder layer: "full", "sliding" or "cross"."""
    heads: int
    kv_heads: int
    head_dim: int
    vision_sites: int
    """Attention modules in the vision encoder, all of which run once a prefill."""
    ragged: bool = True
    """Rows of one batch may hold different numbers of images."""
    mixed_sizes: bool = False
    """Images of one prompt may differ in size, hence in number of tokens."""
    static_cache: bool = True
    no_cache: bool = True
    padding_exact: bool = True
    """A left-padded row gives the logits that it gives alone."""
    shares: Mapping[int, int] = field(default_factory=dict)
    """Layer without a cache -> the earlier layer whose keys and values it reads."""
    hf: bool = True
    """A transformers model: has its generate, caches and attention interface."""
    notes: str = ""

    @property
    def decoder_layers(self) -> int:
        return len(self.attention_kinds)

    @property
    def caches(self) -> tuple[str, ...]:
        """The values of `prefill_and_decode(cache=...)` that the stock model gets right."""
        works = {"none": self.no_cache, "dynamic": True, "static": self.static_cache}
        return tuple(cache for cache in works if works[cache])

    def layers(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(self.decoder_prefix)
        assert isinstance(layers, nn.ModuleList)
        return layers


# --- weights ---


def build(
    model_class: Any, config: Any, attn_implementation: str, dtype: torch.dtype, seed: int, embed_std: float = 1.0
) -> nn.Module:
    """A transformers model from its config, with our weights, that generates greedily without ever stopping."""
    model = seeded(lambda: model_class._from_config(config, attn_implementation=attn_implementation), seed)
    randomise(model, seed, embed_std)
    silence_special_tokens(model.get_output_embeddings().weight)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
    generation.do_sample = False
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = dtype
    return finish(model, dtype)


def seeded(construct: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Construct a module, whose own initialisation may draw, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return construct()


@torch.no_grad()
def randomise(model: nn.Module, seed: int, embed_std: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            if "gate" in name:  # zero at initialisation, which would hide the layers behind it
                parameter.copy_(0.8 + 0.1 * noise)
            elif "q_norm" in name or "k_norm" in name:  # these undo the gain of q_proj and k_proj
                parameter.add_(0.4 + 0.1 * noise)
            else:  # norms and biases: whatever stands there (1, 0, a layer scale), jittered
                parameter.add_(0.1 * noise)
        elif name.endswith("embed_tokens.weight"):
            parameter.copy_(noise * embed_std)
        elif "position" in name or "class" in name or "cls" in name:
            parameter.copy_(noise * 0.3)
        else:
            gain = 1.6 if "q_proj" in name or "k_proj" in name else 3.0 if "lm_head" in name else 1.0
            fan_in = parameter[0].numel()
            parameter.copy_(noise * gain * fan_in**-0.5)


@torch.no_grad()
def silence_special_tokens(head: Tensor) -> None:
    """Logit 0 for every token that is not text: never the argmax among two hundred others."""
    head[:FIRST_TEXT] = 0
    head[LAST_TEXT + 1 :] = 0


def finish(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast as `from_pretrained(dtype=...)` does: the parameters, not the float32 tables of rotary embeddings."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    return model.eval()


# --- prompts ---

# A number is so many text tokens; "A" and "B" are images (of different size where `mixed_sizes`).
RAGGED: tuple[tuple[int | str, ...], ...] = (
    (3, "A", 4, "B", 6),
    (2, "B", 3, "A", 2, "B", 9),
    (5, "A", 4),
    (23,),
)
EVEN: tuple[tuple[int | str, ...], ...] = (
    (3, "A", 4, "B", 6),
    (5, "B", 6, "A", 9),
    (2, "A", 1, "B", 4),
)


@dataclass
class Prompt:
    input_ids: Tensor
    attention_mask: Tensor
    images: list[list[Any]]
    """Per row, what `image` made for each of its images."""

    @property
    def flat_images(self) -> list[Any]:
        return [image for row in self.images for image in row]


def prompt(
    image: Callable[[str, torch.Generator], tuple[Sequence[int], Any]],
    batch: int,
    seed: int,
    first: int = 0,
    ragged: bool = True,
) -> Prompt:
    """Rows `first` .. `first + batch - 1`. `image(size, generator)` gives an image's tokens and whatever it carries."""
    layouts = RAGGED if ragged else EVEN
    rows: list[list[int]] = []
    images: list[list[Any]] = []
    for index in range(first, first + batch):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        row, carried = [BOS], []
        for part in layouts[index % len(layouts)]:
            if isinstance(part, int):
                row += torch.randint(FIRST_TEXT, LAST_TEXT + 1, (part,), generator=generator).tolist()
            else:
                tokens, payload = image(part, generator)
                row += tokens
                carried.append(payload)
        rows.append(row)
        images.append(carried)
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return Prompt(ids, mask, images)


def pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def stacked_inputs(
    tokens: Sequence[int] | dict[str, Sequence[int]],
    side: int,
    tiles: dict[str, int] | None = None,
    extra: Callable[[Prompt], dict[str, Tensor]] | None = None,
) -> Callable[..., dict[str, Tensor]]:
    """`inputs` of a model that takes its images as one tensor of square tiles [tiles of all images, 3, side, side].

    `tokens`: what stands in the prompt for an image. `tiles`: how many tiles an image of each size has (default one).
    """

    def inputs(model: nn.Module, batch: int = 1, seed: int = 0, first: int = 0) -> dict[str, Tensor]:
        def image(size: str, generator: torch.Generator) -> tuple[Sequence[int], Tensor]:
            placeholder = tokens[size] if isinstance(tokens, dict) else tokens
            return placeholder, pixels(generator, tiles[size] if tiles else 1, 3, side, side)

        made = prompt(image, batch, seed, first)
        out = {"input_ids": made.input_ids, "attention_mask": made.attention_mask}
        if made.flat_images:
            out["pixel_values"] = torch.cat(made.flat_images).to(dtype_of(model))
        return out | (extra(made) if extra else {})

    return inputs


def image_tokens(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The usual `visual_positions`: the placeholder's id."""
    return inputs["input_ids"] == IMAGE
