"""The oracle for modality-partitioned attention (A-VL, arXiv 2409.14846): slow and obvious.

    with avl_oracle(model, visual, core=0.3, secondary=0.5, refresh=3, text=0.6) as oracle:
        model.generate(**inputs)

Nothing is moved or left out: every step attends to all keys under a mask that hides what the method would not read.

*Several queries* (the prompt, a later turn, a piece of a chunked prompt): dense, over everything. Its last real row a
(the mean of the last `window` rows, and over the heads) then scores the visual keys of each batch row. With N of them
so far, the `int(secondary * N)` best are secondary, the `int(core * N)` best are core, equal scores going to the
earlier key. Whatever was decided before is forgotten. With `spread` the last `int(spread * S)` of the S keys of
secondary are not the best: they are those of the others whose hash is the lowest, which is `i * 2654435769 + layer *
3242174889 + group * 2447445414` modulo 2 ** 32 for the i-th visual key that is there, counted from 1.

*One query*, step t = 1, 2, ... since then: text and core; at every `refresh`-th step text and secondary, and the row of
that step picks core anew among secondary. `refresh=0`: secondary at every step, core is never used.

*Text* is what stands behind the first visual key of a batch row and is not visual. `budget = max(round(text * n),
minimum)`, where n counts all of it so far. Each row a that scores adds `a_j - quantile(a, 1 - text)` to the score of
each kept text key j, the quantile over those keys (`decay="none"`: adds a_j). Beyond the budget the newest
`budget // 2` stay and, of the rest, the best `budget - budget // 2` by score. What leaves never comes back.

*Prefill filter* (`prefill` < 1): in a prompt that starts a cache, the row that scores layer `after` also ranks the
visual tokens of each batch row, by its mean over the heads. All but the `int(prefill * N)` best of N are dropped, equal
scores going to the earlier token; the last position never is. To every later layer they are gone, in this prompt and
for good: no row attends to them, none of theirs is a row, and they are neither core nor secondary. What a dropped token
itself would see does not matter to anybody, so it is left as it falls.

*Compact*: a later turn attends densely to what was not dropped: minor and evicted text are gone for good, and shares
are still of all visual keys ever fed.

*Lazy layers* of every mode read what their anchor reads: one choice of core and of text for a block. So do layers
without a cache, which read keys and values of an earlier one (`shares`: layer -> that one).

*Late start*: one query whose layer was never seen before (the prompt ran elsewhere) is dense, and its row starts the
partition.

*Lost*: a cache that was cropped, copied or reordered has no state. It is dense until a prompt shows visual keys again;
where the visual positions are known all the same, one query starts late.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from tests.oracle._interface import attention_weights, in_charge, weighted
from tests.oracle.lazy import Blocks, LazyOracle


@dataclass
class LayerState:
    """Masks are bool; `group` is 1 with shared scores, else the number of KV heads."""

    step: int
    visual: Tensor
    """[B, K]"""
    core: Tensor
    """[B, group, K]"""
    secondary: Tensor
    """[B, group, K]"""
    text: Tensor
    """[B, K]: text keys that are kept, those before the first visual key among them"""
    text_scores: Tensor
    """[B, K]"""
    gone: Tensor
    """[B, group, K]: dropped from a compact cache"""
    length: Tensor
    """[B]: text keys behind the first visual one so far, kept or not"""
    seen: int
    """Keys so far, padding included."""


@dataclass
class AvlOracle:
    """Settings, and what each layer has decided so far. Ratios and steps as in the module's text."""

    visual: Tensor
    """bool [B, prompt]; `see` replaces it before a further prompt, and may name keys that are still to come."""
    core: float
    secondary: float
    refresh: int
    text: float
    minimum: int = 20
    window: int = 1
    scores: Literal["shared", "per_kv_head"] = "shared"
    decay: Literal["forgetting", "none"] = "forgetting"
    lazy: LazyOracle | None = None
    kinds: Sequence[str] = ()
    compact: bool = False
    spread: float = 0.0
    prefill: float = 1.0
    after: int = 2
    shares: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers: dict[int, LayerState] = {}
        self.dropped: Tensor | None = None
        """[B, prompt]: visual tokens that the layers behind `after` do not have"""
        self._masks: dict[int, Tensor | None] = {}  # layer -> that of its latest attention
        self.held = 0
        """Keys that the cache holds though nothing is known of them."""
        self.read: list[tuple[int, int]] = []
        """(layer, keys read by the first batch row) of every partitioned step."""

    def see(self, visual: Tensor) -> None:
        """`visual` bool [B, keys so far and those of the next prompt]: another prompt on the same cache."""
        self.visual = visual
        if self.lazy is not None:
            self.lazy.see(visual)

    def lose(self, held: int, told: bool = False) -> None:
        """Nothing is known any more of the `held` keys in the cache; `told`: their visual positions still are."""
        self.layers.clear()
        self.held = held
        if not told:
            self.visual = torch.zeros(1, 0, dtype=torch.bool)  # for any number of rows

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        anchor = self.shares.get(layer) if self.lazy is None else self.lazy.lazy.get(layer, self.shares.get(layer))
        state = self.layers.get(layer)
        if self.kinds and self.kinds[layer] != "full":
            weights = self._weights(layer, q, k, mask, scale, causal)
        elif anchor is not None:
            mask = self._masks[anchor]
            if mask is not None and mask.shape[2] > q.shape[2]:  # a layer without a cache, asked for the last row alone
                mask = mask[:, :, -q.shape[2] :]
            weights = self._weights(layer, q, k, mask, scale, causal)
        elif q.shape[2] > 1 or state is None:
            seen = mask
            visible = _visible(mask, q.shape[0], q.shape[2], k.shape[2], causal)
            filtered = self.prefill < 1 and state is None and q.shape[2] > 1
            if self.compact and state is not None:
                self._grow(state, k.shape[2])
                seen = self._hide(state.gone, q, mask)
            elif filtered and layer > self.after:
                assert self.dropped is not None
                if causal and mask is None:
                    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None]
                seen = self._hide(self.dropped[:, None], q, mask)
                visible = visible & ~self.dropped
            weights = self._weights(layer, q, k, seen, scale, causal)
            self._start(layer, weights, visible, group, state)
            if filtered and layer == self.after:
                self._filter(weights, visible)
        else:
            weights = self._step(state, layer, q, k, mask, scale, group)
        return weighted(weights, v)

    def _weights(
        self, layer: int, q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool = False
    ) -> Tensor:
        self._masks[layer] = mask
        if self.lazy is None:
            return attention_weights(q, k, mask, scale, causal)
        return self.lazy.weights(layer, q, k, mask, scale, causal)

    # --- several queries ---

    def _filter(self, weights: Tensor, visible: Tensor) -> None:
        batch, _, queries, keys = weights.shape
        self.dropped = torch.zeros(batch, keys, dtype=torch.bool)
        for b in range(batch):
            rows = visible[b].nonzero().flatten().tolist()[-self.window :]
            score = weights[b, :, rows].mean(1).mean(0)
            images = [j for j in range(keys) if j < self.visual.shape[1] and self.visual[b, j]]
            lost = len(images) - int(self.prefill * len(images))
            worst = sorted((j for j in images if j < queries - 1), key=lambda j: (float(score[j]), -j))[:lost]
            self.dropped[b, worst] = True

    def _start(self, layer: int, weights: Tensor, visible: Tensor, group: int, state: LayerState | None) -> None:
        batch, heads, queries, keys = weights.shape
        # The last key that is no padding, by row; -1 in a piece of a prompt that is nothing but padding so far.
        last = [max(row.nonzero().flatten().tolist(), default=-1) for row in visible]
        first_query = self.held if state is None else state.seen
        if state is None and queries == 1:  # a late start: everything up to the newest key has been seen
            first_query = max(last)
        row = torch.zeros(batch, heads, keys)
        for b in range(batch):
            rows = [r for r in range(queries) if first_query + r <= last[b] and visible[b, first_query + r]]
            if rows:
                row[b] = weights[b, :, rows[-self.window :]].mean(1)

        visual = torch.zeros(batch, keys, dtype=torch.bool)
        known = min(self.visual.shape[1], first_query + queries)
        visual[:, :known] = self.visual[:, :known].cpu()
        score = self._by_group(row, group)
        behind = visual.cumsum(1) > 0
        gone = torch.zeros_like(score, dtype=torch.bool)
        if self.compact and state is not None:
            gone = state.gone
        there = visual[:, None] & ~gone
        if self.prefill < 1 and state is None and layer > self.after and queries > 1:
            there &= ~self.dropped[:, None]
        secondary = self._best(score, there, visual, self.secondary)
        if self.spread:
            secondary = self._spread(layer, score, visual[:, None] & ~gone, there, secondary)
        self.layers[layer] = LayerState(
            step=0,
            visual=visual,
            core=self._best(score, secondary, visual, self.core),
            secondary=secondary,
            text=visible & ~visual & ~gone.all(1),
            gone=gone,
            text_scores=torch.zeros(batch, keys),
            length=(visible & behind & ~visual).sum(1),
            seen=first_query + queries,
        )
        self._forget(self.layers[layer], row.mean(1))
        self._drop(self.layers[layer])

    def _drop(self, state: LayerState) -> None:
        """What a compact cache does not store: visual keys beyond secondary, and text that left."""
        if self.compact:
            state.gone = state.gone | (state.visual[:, None] & ~state.secondary)
            fed = torch.arange(state.text.shape[1]) < state.seen
            state.gone = state.gone | (~state.text & ~state.visual & fed)[:, None]

    @staticmethod
    def _hide(hidden: Tensor, q: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` without the keys `hidden` [B, group, K]."""
        per_head = hidden.repeat_interleave(q.shape[1] // hidden.shape[1], dim=1)[:, :, None]
        lowest = torch.finfo(q.dtype).min
        hidden = torch.zeros(per_head.shape, dtype=q.dtype).masked_fill(per_head, lowest).to(q.device)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, lowest)
        return hidden if mask is None else torch.minimum(hidden, mask)

    def _by_group(self, row: Tensor, group: int) -> Tensor:
        """[B, H, K] -> [B, 1, K] or [B, KV, K]"""
        if self.scores == "shared":
            return row.mean(1, keepdim=True)
        return row.unflatten(1, (-1, group)).mean(2)

    @staticmethod
    def _best(score: Tensor, among: Tensor, visual: Tensor, ratio: float) -> Tensor:
        """The `int(ratio * N)` best of `among`, bool [B, group, K]; N visual keys in the batch row."""
        chosen = torch.zeros_like(among)
        for b in range(score.shape[0]):
            count = int(ratio * int(visual[b].sum()))
            for g in range(score.shape[1]):
                candidates = among[b, g].nonzero().flatten()
                order = score[b, g, candidates].sort(descending=True, stable=True).indices
                chosen[b, g, candidates[order[:count]]] = True
        return chosen

    def _spread(self, layer: int, score: Tensor, counted: Tensor, there: Tensor, secondary: Tensor) -> Tensor:
        """`secondary`, the last of which give way to keys that are spread evenly."""
        chosen = torch.zeros_like(secondary)
        for b in range(score.shape[0]):
            for g in range(score.shape[1]):
                candidates = there[b, g].nonzero().flatten().tolist()
                size = int(secondary[b, g].sum())
                count = int(self.spread * size)
                best = sorted(candidates, key=lambda j: -float(score[b, g, j]))[: size - count]
                offset = layer * 3242174889 + g * 2447445414
                numbered = enumerate(counted[b, g].nonzero().flatten().tolist(), start=1)
                turn = {j: (i * 2654435769 + offset) % 2**32 for i, j in numbered}
                others = sorted((j for j in candidates if j not in best), key=turn.__getitem__)
                chosen[b, g, best + others[:count]] = True
        return chosen

    # --- one query ---

    def _step(
        self, state: LayerState, layer: int, q: Tensor, k: Tensor, mask: Tensor | None, scale: float, group: int
    ) -> Tensor:
        state.step += 1
        self._grow(state, k.shape[2])
        state.text[:, state.seen] = True
        state.length += 1
        state.seen += 1
        refresh = self.refresh > 0 and state.step % self.refresh == 0
        images = state.secondary if refresh or self.refresh == 0 else state.core
        readable = images | state.text[:, None]  # [B, group, K]
        self.read.append((layer, int(readable[0, 0].sum())))
        weights = self._weights(layer, q, k, self._hide(~readable, q, mask), scale)
        row = weights[:, :, 0].float().cpu()  # what is decided is decided there
        if refresh:
            state.core = self._best(self._by_group(row, group), state.secondary, state.visual, self.core)
        self._forget(state, row.mean(1))
        self._drop(state)
        return weights

    @staticmethod
    def _grow(state: LayerState, keys: int) -> None:
        """A dynamic cache has one key more each step."""
        more = keys - state.text.shape[1]
        if more > 0:
            for name in ("visual", "core", "secondary", "text", "text_scores", "gone"):
                setattr(state, name, torch.nn.functional.pad(getattr(state, name), (0, more)))

    # --- text ---

    def _forget(self, state: LayerState, row: Tensor) -> None:
        """Score the kept text keys by `row` [B, K], then evict beyond the budget."""
        if self.text == 1:
            return
        for b in range(row.shape[0]):
            if not state.visual[b].any():
                continue
            first = int(state.visual[b].nonzero().min())
            evictable = state.text[b].clone()
            evictable[:first] = False
            kept = evictable.nonzero().flatten()
            if not len(kept):
                continue
            weights = row[b, kept]
            threshold = weights.quantile(1 - self.text) if self.decay == "forgetting" else 0.0
            state.text_scores[b, kept] += weights - threshold

            budget = max(round(self.text * int(state.length[b])), self.minimum)
            if len(kept) <= budget:
                continue
            recent = kept[len(kept) - budget // 2 :]
            rest = kept[: len(kept) - budget // 2]
            order = state.text_scores[b, rest].sort(descending=True, stable=True).indices
            keep = torch.cat([rest[order[: budget - budget // 2]], recent])
            state.text[b, kept] = False
            state.text[b, keep] = True


def _visible(mask: Tensor | None, batch: int, queries: int, keys: int, causal: bool) -> Tensor:
    """Which keys the last query sees, bool [B, K]."""
    if mask is None:
        return (torch.arange(keys) < (queries if causal else keys)).expand(batch, -1)
    row = mask[:, :, -1, :keys].cpu()
    row = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
    return row.any(1).expand(batch, -1)


@contextmanager
def avl_oracle(
    model: nn.Module,
    visual: Tensor,
    *,
    core: float,
    secondary: float,
    refresh: int,
    text: float,
    blocks: Blocks = (),
    mode: str = "gla",
    decoder_prefix: str = "model.language_model.layers",
    kinds: Sequence[str] | None = None,
    **settings: object,
) -> Iterator[AvlOracle]:
    """Run `model` with modality-partitioned attention, and lazy layers in `blocks` if any.

    `visual` bool [B, prompt]. `kinds`, a layer: "full", "sliding" or "cross"; layers that are not full stay dense.
    """
    layers = list(model.get_submodule(decoder_prefix))
    kinds = kinds or ["full"] * len(layers)
    oracle = AvlOracle(
        visual,
        core,
        secondary,
        refresh,
        text,
        lazy=LazyOracle(blocks, kinds, mode, visual) if blocks else None,
        kinds=kinds,
        **settings,  # type: ignore[arg-type]
    )
    with in_charge(model, layers, oracle):
        yield oracle
