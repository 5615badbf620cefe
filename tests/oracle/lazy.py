"""The oracle for lazy attention in its three modes: slow and obvious.

    with lazy_oracle(model, blocks=[(1, 3)], decoder_prefix="model.language_model.layers", kinds=["full"] * 4):
        model.generate(**inputs)

A block is an inclusive range of decoder layers. Its first layer is the anchor; the others are lazy. Every layer
computes, and caches, queries and keys of its own, and uses its own values, mask, scale and everything else. What a lazy
layer takes from its anchor's attention in the same forward pass (queries and keys after norms, RoPE and the cache, so
keys of the whole history) depends on the mode:

*gla*: queries and keys.

*vla*: queries and keys at visual positions.

*vla_scores*: the logits of all queries against visual keys. One softmax covers these and the layer's own logits against
text keys.

Some layers of a block stay dense: one whose kind (full, sliding, cross) is not the anchor's, one whose queries or keys
have another shape, every cross-attention layer, and the whole block if the anchor is a cross-attention layer. In the
modes that ask for visual positions so do all layers whose kind is not "full", and everything where nothing is visual.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tests.oracle._interface import in_charge, logits_of, softmax_rows, weighted

Blocks = Sequence[tuple[int, int]]


class LazyOracle:
    """What each layer does. `lazy`: layer -> its anchor; `dense`: layer of a block that stays dense -> why."""

    def __init__(self, blocks: Blocks, kinds: Sequence[str], mode: str = "gla", visual: Tensor | None = None) -> None:
        self.mode = mode
        self.visual = visual
        """bool [B, prompt]; later keys are text. `see` replaces it before a further prompt."""
        self.lazy: dict[int, int] = {}
        self.dense: dict[int, str] = {}
        self.calls = 0  # attentions that took something from an anchor
        self._from_anchor: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: dict[int, int] = {}  # layer -> keys so far
        seen: set[int] = set()
        for first, last in blocks:
            layers = range(first, last + 1)
            if first < 0 or last >= len(kinds) or first > last or seen & set(layers):
                raise ValueError(f"blocks {list(blocks)} overlap or leave the {len(kinds)} layers")
            seen |= set(layers)
            for layer in layers:
                if kinds[first] == "cross":
                    self.dense[layer] = "the anchor is a cross-attention layer"
                elif layer > first and kinds[layer] != kinds[first]:
                    self.dense[layer] = f"kind {kinds[layer]}, anchor {kinds[first]}"
                elif layer > first and mode != "gla" and kinds[layer] != "full":
                    self.dense[layer] = f"kind {kinds[layer]} in mode {mode}"
                elif layer > first:
                    self.lazy[layer] = first

    def see(self, visual: Tensor) -> None:
        """`visual` bool [B, keys so far and those of the next prompt]: another prompt on the same cache."""
        self.visual = visual

    def weights(
        self, layer: int, q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool = False
    ) -> Tensor:
        """Softmax rows [B, H, Q, K] of `layer`, given its own queries and keys."""
        if layer in self.lazy.values():  # an anchor: each forward pass overwrites what the last one left
            self._from_anchor[layer] = (q, k)
        queries, keys = q.shape[2], k.shape[2]
        first = 0 if queries == keys else self._seen.get(layer, 0)
        self._seen[layer] = first + queries
        own = logits_of(q, k, scale)
        if layer not in self.lazy:
            return softmax_rows(own, mask, causal)
        anchor_q, anchor_k = self._from_anchor[self.lazy[layer]]
        if anchor_q.shape != q.shape or anchor_k.shape != k.shape:
            self.dense[layer] = f"q {[*q.shape]} and k {[*k.shape]}, anchor {[*anchor_q.shape]} and {[*anchor_k.shape]}"
            del self.lazy[layer]
            return softmax_rows(own, mask, causal)
        self.calls += 1
        if self.mode == "gla":
            return softmax_rows(logits_of(anchor_q, anchor_k, scale), mask, causal)
        flags = torch.zeros(q.shape[0], max(keys, first + queries), dtype=torch.bool, device=q.device)
        if self.visual is not None:
            known = min(self.visual.shape[1], flags.shape[1])
            flags[:, :known] = self.visual[:, :known]
        of_keys, of_queries = flags[:, :keys], flags[:, first : first + queries]
        if self.mode == "vla":
            q = torch.where(of_queries[:, None, :, None], anchor_q, q)
            k = torch.where(of_keys[:, None, :, None], anchor_k, k)
            return softmax_rows(logits_of(q, k, scale), mask, causal)
        assert self.mode == "vla_scores", self.mode
        logits = torch.where(of_keys[:, None, None, :], logits_of(anchor_q, anchor_k, scale), own)
        return softmax_rows(logits, mask, causal)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        return weighted(self.weights(layer, q, k, mask, scale, causal), v)


@contextmanager
def lazy_oracle(
    model: nn.Module,
    blocks: Blocks,
    decoder_prefix: str = "model.language_model.layers",
    kinds: Sequence[str] | None = None,
    mode: str = "gla",
    visual: Tensor | None = None,
) -> Iterator[LazyOracle]:
    """Run `model` with lazy attention in `blocks`.

    `kinds`, a layer: "full", "sliding" or "cross"; all full if None. `visual` bool [B, prompt], for modes other than
    "gla".
    """
    layers = list(model.get_submodule(decoder_prefix))
    oracle = LazyOracle(blocks, kinds or ["full"] * len(layers), mode, visual)
    with in_charge(model, layers, oracle):
        yield oracle
