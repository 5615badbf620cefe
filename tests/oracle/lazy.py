"""The oracle for lazy attention, mode "gla": slow and obvious.

    with lazy_oracle(model, blocks=[(1, 3)], decoder_prefix="model.language_model.layers", kinds=["full"] * 4):
        model.generate(**inputs)

A block is an inclusive range of decoder layers. Its first layer is the anchor; the others are lazy. A lazy layer
attends with the queries and keys that the anchor's attention received in the same forward pass (after norms, RoPE and
the cache, so keys of the whole history), and with its own values, mask, scale and everything else. It still computes,
and caches, queries and keys of its own, which nobody reads.

Some layers of a block stay dense: one whose kind (full, sliding, cross) is not the anchor's, one whose queries or keys
have another shape, every cross-attention layer, and the whole block if the anchor is a cross-attention layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from tests.oracle._interface import attend, in_charge

Blocks = Sequence[tuple[int, int]]


class LazyOracle:
    """What each layer does. `lazy`: layer -> its anchor; `dense`: layer of a block that stays dense -> why."""

    def __init__(self, blocks: Blocks, kinds: Sequence[str]) -> None:
        self.lazy: dict[int, int] = {}
        self.dense: dict[int, str] = {}
        self.calls = 0  # attentions that used an anchor's queries and keys
        self._from_anchor: dict[int, tuple[Tensor, Tensor]] = {}
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
                elif layer > first:
                    self.lazy[layer] = first

    def queries_and_keys(self, layer: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Those that `layer` attends with, given its own."""
        if layer in self.lazy.values():  # an anchor: each forward pass overwrites what the last one left
            self._from_anchor[layer] = (q, k)
        if layer not in self.lazy:
            return q, k
        anchor_q, anchor_k = self._from_anchor[self.lazy[layer]]
        if anchor_q.shape != q.shape or anchor_k.shape != k.shape:
            self.dense[layer] = f"q {[*q.shape]} and k {[*k.shape]}, anchor {[*anchor_q.shape]} and {[*anchor_k.shape]}"
            del self.lazy[layer]
            return q, k
        self.calls += 1
        return anchor_q, anchor_k

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        q, k = self.queries_and_keys(layer, q, k)
        return attend(q, k, v, mask, scale, causal)


@contextmanager
def lazy_oracle(
    model: nn.Module,
    blocks: Blocks,
    decoder_prefix: str = "model.language_model.layers",
    kinds: Sequence[str] | None = None,
) -> Iterator[LazyOracle]:
    """Run `model` with lazy attention in `blocks`. `kinds`, a layer: "full", "sliding" or "cross"; all full if None."""
    layers = list(model.get_submodule(decoder_prefix))
    oracle = LazyOracle(blocks, kinds or ["full"] * len(layers))
    with in_charge(model, layers, oracle):
        yield oracle
