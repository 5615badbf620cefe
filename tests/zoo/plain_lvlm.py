"""A hand-written LVLM in plain PyTorch: nothing of transformers, as a research code base would have it.

Special: images (16 tokens) are spliced in by indexing, not `masked_scatter`. The KV cache is a list of tensors
[k0, v0, k1, v1, ...] that `forward` takes and returns: grown by `cat`, or fixed in size and written in place where
`slots` says. RoPE rotates neighbouring pairs. "sdpa" expands K and V to all heads; "eager" repeats them and spells the
softmax out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo._base import (
    IMAGE,
    VOCAB,
    ZooModel,
    dtype_of,
    finish,
    image_tokens,
    randomise,
    seeded,
    silence_special_tokens,
    stacked_inputs,
)

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 4
TOWER, PATCH, SIDE = 32, 6, 24


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class VisionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(TOWER), nn.LayerNorm(TOWER)
        self.qkv, self.out = nn.Linear(TOWER, 3 * TOWER), nn.Linear(TOWER, TOWER)
        self.mlp = nn.Sequential(nn.Linear(TOWER, 48), nn.GELU(), nn.Linear(48, TOWER))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class DecoderLayer(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 96), nn.SiLU(), nn.Linear(96, HIDDEN))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q [B, H, Q, D], k and v [B, KV, K, D], mask bool [B, 1, Q, K]. The oracle overrides this."""
        groups = HEADS // KV_HEADS
        if self.style == "eager":
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5
            scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
            return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        k, v = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def forward(self, x, cos, sin, mask, past_k, past_v, slots):
        hidden = self.norm1(x)
        q, k, v = (
            proj(hidden).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if slots is not None:
            k, v = past_k.index_copy_(2, slots, k), past_v.index_copy_(2, slots, v)
        elif past_k is not None:
            k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        x = x + self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), k, v


class PlainLVLM(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, TOWER, PATCH, PATCH)
        self.tower = nn.ModuleList(VisionLayer() for _ in range(2))
        self.projector = nn.Linear(TOWER, HIDDEN)
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(DecoderLayer(style) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def encode(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        for layer in self.tower:
            x = layer(x)
        return self.projector(x)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        cache: list[Tensor] | None = None,
        slots: Tensor | None = None,
        use_cache: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """`attention_mask` [batch, keys] covers the cache too. `slots` [queries]: where to write in a fixed cache."""
        x = self.embed_tokens(input_ids)
        if pixel_values is not None:
            features = self.encode(pixel_values).flatten(0, 1)
            is_image = input_ids == IMAGE
            which = (is_image.flatten().cumsum(0) - 1).clamp(min=0).view_as(input_ids)
            x = torch.where(is_image.unsqueeze(-1), features[which], x)

        queries, keys = input_ids.shape[1], attention_mask.shape[1]
        key_slot = torch.arange(keys, device=x.device)
        query_slot = key_slot[keys - queries :] if slots is None else slots
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, query_slot]
        own = key_slot == query_slot.unsqueeze(-1)
        causal = key_slot <= query_slot.unsqueeze(-1)
        mask = (causal & attention_mask.bool()[:, None, None, :]) | own

        frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2, device=x.device) / HEAD_DIM)
        angles = positions[:, None, :, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        kept: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            past_k, past_v = (None, None) if cache is None else cache[2 * i : 2 * i + 2]
            x, k, v = layer(x, cos, sin, mask, past_k, past_v, slots)
            if use_cache:
                kept += [k, v]
        return self.lm_head(self.norm(x)), kept

    @torch.no_grad()
    def generate(
        self, input_ids, attention_mask, pixel_values=None, steps=4, cache="dynamic", forward=None, forced=None
    ):
        """Greedy. Returns the logits of each step, the tokens chosen (or `forced`), and the cache."""
        step_forward = forward or self
        batch, length = input_ids.shape
        kept, slots = None, None
        if cache == "static":
            shape = (batch, KV_HEADS, length + steps, HEAD_DIM)
            kept = [torch.zeros(shape, dtype=dtype_of(self), device=input_ids.device) for _ in range(2 * LAYERS)]
            slots = torch.arange(length, device=input_ids.device)
        logits, tokens, ids, mask = [], [], input_ids, attention_mask
        for step in range(steps + 1):
            full = F.pad(mask, (0, length + steps - mask.shape[1])) if cache == "static" else mask
            images = pixel_values if step == 0 or cache == "none" else None
            out, kept = step_forward(ids, full, pixel_values=images, cache=kept, slots=slots, use_cache=cache != "none")
            logits.append(out[:, -1].float())
            tokens.append(logits[-1].argmax(-1) if forced is None or step >= forced.shape[1] else forced[:, step])
            mask = F.pad(mask, (0, 1), value=1)
            if cache == "none":
                ids, kept = torch.cat((ids, tokens[-1][:, None]), 1), None
            else:
                ids = tokens[-1][:, None]
                slots = None if slots is None else torch.tensor([length + step], device=input_ids.device)
        return logits, torch.stack(tokens, 1), kept


def make(attn_implementation="sdpa", dtype=torch.float32, seed=0, construct=PlainLVLM):
    model = seeded(lambda: construct(attn_implementation), seed)
    randomise(model, seed)
    silence_special_tokens(model.lm_head.weight)
    return finish(model, dtype)


MODEL = ZooModel(
    name="plain_lvlm",
    make=make,
    inputs=stacked_inputs([IMAGE] * (SIDE // PATCH) ** 2, SIDE),
    visual_positions=image_tokens,
    decoder_prefix="layers",
    attention_kinds=("full",) * LAYERS,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    vision_sites=2,
    hf=False,
)
