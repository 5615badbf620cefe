"""Attention modules as data: the many ways in which models write one attention call.

A `Spelling` is one module and its inputs. `Spelling.plain` says whether the passes *must* recognise it: refusing
everything fails. `Spelling.expected` says what the site must then record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BOOLEAN", "CACHES", "MASKS", "Spelling"]

CACHES = ("none", "cat", "index_copy", "setitem", "index_put")
MASKS = ("none", "causal_flag", "causal", "padding", "left_padding", "prefix", "per_head", "keys_only")
INFINITE = ("fill_inf", "where_inf", "where_hidden", "method_where")
BOOLEAN = (*INFINITE, "fill_min", "where_min")
"""Ways to apply a boolean mask; the others add one."""
NEW = 3
"""Position in a static cache at which this call writes."""


@dataclass(frozen=True)
class Spelling:
    """One way to write attention, with one set of sizes."""

    style: str = "sdpa"  # sdpa, softmax
    layout: str = "transpose"  # bhsd; from [batch, sequence, heads, dim]: transpose, permute; projected: linear
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    batch: int = 2
    queries: int = 5
    past: int = 4
    """Keys before this call's own, where there is a cache."""
    dtype: torch.dtype = torch.float32
    repeat: str = "expand"  # expand, unsqueeze, interleave, flatten, gqa (sdpa's own)
    after_repeat: str = "none"  # none, contiguous, slice
    scale: float | None = None
    scaling: str = "mul"  # mul, rmul, div, inplace, query, key, key_and_query, none (scale 1)
    mask: str = "none"
    masking: str = "add"  # add, radd, inplace, fill_inf, fill_min, where_inf, where_min
    mask_in_graph: bool = False
    transpose: str = "(2, 3)"  # (2, 3), (-1, -2), mT, permute
    product: str = "torch.matmul"  # torch.matmul, @, method
    softmax: str = "functional"  # functional, torch, method, module
    maximum: str = "kept"  # kept; taken off the logits, which changes nothing: max, amax
    upcast: str = "none"  # none, dtype (softmax in float32), logits (everything after the product)
    dropout: str = "none"  # none, zero, eval, module
    cache: str = "none"
    dynamic: str = "no"  # no, mark (batch and lengths), all
    output: str = "transpose"  # transpose (to [batch, queries, heads * dim]), plain

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def keys(self) -> int:
        if self.cache == "none":
            return self.queries
        return self.past + self.queries if self.cache == "cat" else self.past + self.queries + 2

    @property
    def factor(self) -> float:
        """The scale that the module applies."""
        if self.style == "softmax" and self.scaling == "none":
            return 1.0
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def plain(self) -> bool:
        """Whether the site must be recognised: everything but symbolic head counts.

        Under ``dynamic=True`` the weights of a projection fix heads and head dim; nothing fixes those of a bare buffer.
        """
        return self.dynamic != "all" or (self.layout == "linear" and self.cache in ("none", "cat"))

    def expected(self) -> dict[str, Any]:
        """Fields of the site."""
        if self.mask == "none":
            mask = "none"
        elif self.mask == "causal_flag" and self.style == "sdpa":
            mask = "causal"
        elif self.style == "sdpa":
            mask = "bool" if self.masking in BOOLEAN else "additive"
        else:
            mask = "bool" if self.masking in INFINITE else "additive"
        cache = {"none": "none", "cat": "dynamic"}.get(self.cache, "static")
        folded = self.style == "softmax" and self.scaling in ("query", "key", "key_and_query")
        # Keys that are scaled between the cache and the product are new keys: one for every query head.
        new_keys = self.style == "softmax" and self.scaling in ("key", "key_and_query")
        return {
            "heads": self.heads,
            "kv_heads": self.heads if new_keys else self.kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "mask": mask,
            "cache": "none" if new_keys else cache,
            "scale": 1.0 if folded else self.factor,
            "unrepeated": self.groups > 1 and self.repeat != "gqa" and not new_keys,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def inputs(self, seed: int = 0) -> tuple[Tensor | None, ...]:
        """Query, key, value, mask, cached keys, cached values, positions: what `module` takes."""
        generator = torch.Generator().manual_seed(seed)

        def make(heads: int, length: int, dim: int, layout: str) -> Tensor:
            data = 1.5 * torch.randn(self.batch, heads, length, dim, generator=generator)
            if layout == "linear":
                data = data.transpose(1, 2).flatten(2)
            elif layout != "bhsd":
                data = data.transpose(1, 2).contiguous()
            return data.to(self.dtype)

        query = make(self.heads, self.queries, self.head_dim, self.layout)
        key = make(self.kv_heads, self.queries, self.head_dim, self.layout)
        value = make(self.kv_heads, self.queries, self.value_dim, self.layout)
        stored = self.past if self.cache == "cat" else self.keys
        past_key = None if self.cache == "none" else make(self.kv_heads, stored, self.head_dim, "bhsd")
        past_value = None if self.cache == "none" else make(self.kv_heads, stored, self.value_dim, "bhsd")
        positions = torch.arange(NEW, NEW + self.queries) if self.cache in CACHES[2:] else None
        return query, key, value, self._mask(generator), past_key, past_value, positions

    def marks(self) -> list[tuple[int, int]]:
        """Dimensions to mark dynamic: batch and lengths of every input."""
        if self.dynamic != "mark":
            return []
        length = 2 if self.layout == "bhsd" else 1
        marks = [(i, 0) for i in range(3)] + ([(i, length) for i in range(3)] if self.queries > 1 else [])
        if self.cache == "cat":
            marks += [(4, 0), (5, 0), (4, 2), (5, 2)]
        if (mask := self.inputs()[3]) is not None:
            marks += [(3, dim) for dim in range(mask.dim()) if dim != mask.dim() - 3]
        return marks

    def visible(self) -> Tensor | None:
        """Boolean mask, True where a key is seen."""
        queries, keys = self.queries, self.keys
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        if self.mask == "causal_flag":
            return torch.ones(queries, keys, dtype=torch.bool).tril()[None, None]
        if self.mask == "causal":
            return causal[None, None]
        padding = torch.ones(self.batch, 1, 1, keys, dtype=torch.bool)
        padding[-1, ..., :2] = False
        if self.mask == "padding":
            padding[-1, ..., 0] = True
            return padding
        if self.mask == "left_padding":
            return causal & padding
        if self.mask == "prefix":
            both = torch.arange(keys) < 3
            return (causal | both)[None, None].expand(self.batch, -1, -1, -1)
        if self.mask == "keys_only":
            return padding[-1:, 0, 0]
        return None

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        if self.mask in ("none", "causal_flag"):
            return None
        if self.mask == "per_head":
            noise = torch.randn(1, self.heads, self.queries, self.keys, generator=generator)
            if self.masking in BOOLEAN:
                visible = noise > -0.5
                visible[..., 0] = True
                return visible
            return noise.to(self.dtype)
        visible = self.visible()
        assert visible is not None
        if self.masking in BOOLEAN:
            return visible
        return torch.zeros(visible.shape, dtype=self.dtype).masked_fill(~visible, torch.finfo(self.dtype).min)

    def module(self) -> nn.Module:
        """The module, in eval mode."""
        return _Attention(self).eval()


class _Attention(nn.Module):
    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.normalise = nn.Softmax(dim=-1)
        self.drop = nn.Dropout(0.3)
        self.scale, self.factor, self.divisor = spelling.scale, spelling.factor, 1.0 / spelling.factor
        widths = (
            spelling.heads * spelling.head_dim,
            spelling.kv_heads * spelling.head_dim,
            spelling.kv_heads * spelling.value_dim,
        )
        weights = (torch.eye(width, dtype=spelling.dtype) for width in widths)
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        past_key: Tensor | None,
        past_value: Tensor | None,
        positions: Tensor | None,
    ) -> Any:
        s = self.spelling
        query = self._split(query, self.weights[0], s.head_dim)
        key = self._split(key, self.weights[1], s.head_dim)
        value = self._split(value, self.weights[2], s.value_dim)
        key, value = self._cache(key, past_key, positions), self._cache(value, past_value, positions)
        returned = (key, value) if s.cache == "cat" else ()
        if s.mask_in_graph and s.mask == "causal":
            mask = self._causal(query, key)
        full_key, full_value = self._repeat(key), self._repeat(value)
        if s.style == "sdpa":
            out = F.scaled_dot_product_attention(
                query,
                full_key,
                full_value,
                attn_mask=mask,
                is_causal=s.mask == "causal_flag",
                scale=self.scale,
                enable_gqa=s.repeat == "gqa",
            )
        else:
            out = self._softmax(query, full_key, full_value, mask)
        if s.output == "transpose":
            out = out.transpose(1, 2).contiguous().view(query.shape[0], query.shape[2], -1)
        return out, *returned

    def _split(self, x: Tensor, weight: Tensor, dim: int) -> Tensor:
        layout = self.spelling.layout
        if layout == "linear":
            return F.linear(x, weight).view(*x.shape[:-1], -1, dim).transpose(1, 2)
        if layout == "transpose":
            return x.transpose(1, 2)
        return x.permute(0, 2, 1, 3) if layout == "permute" else x

    def _cache(self, new: Tensor, past: Tensor | None, positions: Tensor | None) -> Tensor:
        kind = self.spelling.cache
        if kind == "none" or past is None:
            return new
        if kind == "cat":
            return torch.cat([past, new], dim=-2)
        assert positions is not None
        if kind == "index_copy":
            past.index_copy_(2, positions, new)
        elif kind == "setitem":
            past[:, :, positions] = new
        else:
            batch, heads = torch.arange(past.shape[0]), torch.arange(past.shape[1])
            past.index_put_((batch[:, None, None], heads[None, :, None], positions), new)
        return past

    def _repeat(self, x: Tensor) -> Tensor:
        s = self.spelling
        if s.groups == 1 or s.repeat == "gqa":
            return x
        batch, heads, length, dim = x.shape
        if s.repeat == "expand":
            x = x[:, :, None, :, :].expand(batch, heads, s.groups, length, dim)
            x = x.reshape(batch, heads * s.groups, length, dim)
        elif s.repeat == "unsqueeze":
            x = x.unsqueeze(2).expand(-1, -1, s.groups, -1, -1).contiguous().view(batch, s.heads, length, dim)
        elif s.repeat == "flatten":
            x = x[:, :, None].repeat(1, 1, s.groups, 1, 1).flatten(1, 2)
        else:
            x = torch.repeat_interleave(x, dim=1, repeats=s.groups)
        if s.after_repeat == "contiguous":
            return x.contiguous()
        return x[:, :, :length, :] if s.after_repeat == "slice" else x

    def _causal(self, query: Tensor, key: Tensor) -> Tensor:
        rows = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
        visible = (torch.arange(key.shape[2])[None] <= rows)[None, None]
        if self.spelling.masking in BOOLEAN:
            return visible
        zeros = torch.zeros(visible.shape, dtype=query.dtype)
        return zeros.masked_fill(~visible, torch.finfo(query.dtype).min)

    def _softmax(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        s = self.spelling
        if s.scaling == "query":
            query = query * self.factor
        elif s.scaling == "key":
            key = key * self.factor
        elif s.scaling == "key_and_query":
            query, key = query * self.factor**0.5, key * self.factor**0.5
        logits = self._product(query, self._transposed(key))
        if s.upcast == "logits":
            logits = logits.float()
        if s.scaling == "mul":
            logits = logits * self.factor
        elif s.scaling == "rmul":
            logits = self.factor * logits
        elif s.scaling == "div":
            logits = logits / self.divisor
        elif s.scaling == "inplace":
            logits *= self.factor
        if s.mask == "causal_flag":
            visible = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
            fill = -torch.inf if s.masking in INFINITE else torch.finfo(s.dtype).min
            logits = logits.masked_fill(~visible, fill)
        elif mask is not None:
            logits = self._masked(logits, mask)
        if s.maximum == "max":
            logits = logits - logits.max(dim=-1, keepdim=True).values
        elif s.maximum == "amax":
            logits = torch.sub(logits, torch.amax(logits, -1, keepdim=True))
        weights = self._normalised(logits)
        if s.upcast != "none":
            weights = weights.to(value.dtype)
        if s.dropout == "zero":
            weights = F.dropout(weights, p=0.0, training=True)
        elif s.dropout == "eval":
            weights = F.dropout(weights, 0.3, self.training)
        elif s.dropout == "module":
            weights = self.drop(weights)
        return self._product(weights, value)

    def _transposed(self, key: Tensor) -> Tensor:
        how = self.spelling.transpose
        if how == "mT":
            return key.mT
        if how == "permute":
            return key.permute(0, 1, 3, 2)
        return key.transpose(2, 3) if how == "(2, 3)" else key.transpose(-1, -2)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        how = self.spelling.product
        if how == "@":
            return left @ right
        return left.matmul(right) if how == "method" else torch.matmul(left, right)

    def _masked(self, logits: Tensor, mask: Tensor) -> Tensor:
        how = self.spelling.masking
        lowest = torch.finfo(logits.dtype).min
        if how == "add":
            return logits + mask
        if how == "radd":
            return mask + logits
        if how == "inplace":
            logits += mask
            return logits
        if how == "fill_inf":
            return logits.masked_fill(~mask, float("-inf"))
        if how == "fill_min":
            return logits.masked_fill(mask.logical_not(), lowest)
        if how == "where_hidden":
            return torch.where(~mask, float("-inf"), logits)
        if how == "method_where":
            return logits.where(mask, float("-inf"))
        return torch.where(mask, logits, float("-inf") if how == "where_inf" else lowest)

    def _normalised(self, logits: Tensor) -> Tensor:
        how = self.spelling.softmax
        dtype = torch.float32 if self.spelling.upcast == "dtype" else None
        if how == "functional":
            return F.softmax(logits, dim=-1, dtype=dtype)
        if how == "torch":
            return torch.softmax(logits, -1, dtype)
        if how == "method":
            return logits.softmax(dim=-1, dtype=dtype)
        return self.normalise(logits if dtype is None else logits.float())
